"""Compare runs, or look at a sweep or one run, without an account: python report.py RUN_DIRECTORY...

Prints the runs as a table and writes a page with their curves and comparison, report.html, that opens from disk.
"""

import argparse
import signal
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import UserError
from harness.files import replacing
from harness.script import run_script

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C during the imports ends the process without a traceback

import torch

from reporting.runs import MARK, find_runs, groups, run_table, seconds, seed_table, sort_runs, text
from reporting.sweep import open_study, sweep_charts


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command-line arguments. Raises `UserError` if one is invalid."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="RUN_DIRECTORY",
        help="of a run, of a sweep, or of several runs",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="the page to write [report.html]"
    )
    return parser.parse_args(argv)


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Print a table in columns."""
    cells = [[text(value)[:40] for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())


def check_output(path: Path) -> None:
    """Raise `UserError` if the page would replace something that is not a report."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"--output {path} is not a file; choose another name")
    if path.exists() and MARK.encode() not in path.open("rb").read(200):
        raise UserError(f"--output {path} is not a report; choose another name")


def report(arguments: argparse.Namespace) -> None:
    """Print the table and write the page."""
    check_output(arguments.output)
    runs = find_runs(arguments.directories)
    studies, problems = {}, []
    for directory in dict.fromkeys(
        path for path in arguments.directories if (path / "study.db").is_file()
    ):
        try:
            studies[directory] = open_study(directory, runs)
        except UserError as error:
            problems.append(f"{directory}: {error}")
    runs = sort_runs(runs)
    header, rows = run_table(runs)
    print_table(header, [[*row[:-1], seconds(row[-1])] for row in rows])
    seeds = groups(runs)
    if seeds:
        print()
        print_table(*seed_table(runs, seeds))
    for line in (*problems, *(f"{run.label}: {note}" for run in runs for note in run.notes)):
        print(text(line))
    try:
        from reporting.page import make_page
    except ImportError as error:
        raise UserError(
            f"no page without plotly ({error}): pip install -r requirements-report.txt"
        ) from None
    page = make_page(
        runs, [sweep_charts(study, directory) for directory, study in studies.items()], problems
    )
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.output) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"--output {arguments.output}: can't write there ({error.strerror})"
        ) from None
    print(f"\nThe page: {arguments.output} ({len(page) / 1e6:.1f} MB)")


def main(argv: list[str] | None = None) -> None:
    """Report on the directories on the command line. Raises `UserError` if one holds no run."""
    try:
        report(parse_arguments(argv))
    except UserError as error:  # may quote a path with line breaks
        raise UserError(text(str(error)), error.status) from None


if __name__ == "__main__":
    torch.set_num_threads(
        1
    )  # the tensors are small: several threads would mostly wait for each other
    run_script(main)
