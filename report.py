"""Compare runs, or view a sweep or one run, without an account: python report.py RUN_DIRECTORY...

Prints the runs as a table and writes a page with their curves and comparison, report.html, that
opens from disk.
"""

import argparse
import signal
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import UserError
from harness.files import write_text
from harness.script import run_script

if __name__ == "__main__":
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from reporting.markup import MARK
from reporting.runs import (
    find_runs,
    format_value,
    groups,
    run_table,
    seed_table,
    sort_runs,
)
from reporting.sweep import open_study


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
        "--output", type=Path, default="report.html", help="the page to write [report.html]"
    )
    return parser.parse_args(argv)


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Print a table in columns."""
    cells = []
    for row in [header, *rows]:
        cells.append([format_value(value)[:40] for value in row])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def check_output(path: Path) -> None:
    """Raise `UserError` if the page would replace something that is not a report."""
    if path.is_file() and not path.is_symlink():
        if MARK.encode() not in path.open("rb").read(200):
            raise UserError(f"--output {path} is not a report; choose another name")
    elif path.exists() or path.is_symlink():
        raise UserError(f"--output {path} is not a file; choose another name")


def report(arguments: argparse.Namespace) -> None:
    """Print the table and write the page."""
    output = arguments.output
    check_output(output)
    runs = find_runs(arguments.directories)
    studies = {}
    problems = []
    for directory in arguments.directories:
        if (directory / "study.db").is_file():
            try:
                studies[directory] = open_study(directory, runs)
            except UserError as error:
                problems.append(format_value(f"{directory}: {error}"))
    runs = sort_runs(runs)
    seed_groups = groups(runs)
    header, rows = run_table(runs)
    for row in rows:
        _, row[-1] = row[-1]  # the time as text
    print_table(header, rows)
    if seed_groups:
        print()
        print_table(*seed_table(runs, seed_groups))
    for run in runs:
        problems += [f"{run.label}: {note}" for note in run.notes]
    for problem in problems:
        print(problem)
    try:
        from reporting.page import make_page
    except ImportError as error:
        raise UserError(
            f"no page without plotly ({error}): pip install -r requirements-report.txt"
        ) from None
    page = make_page(runs, seed_groups, studies, problems)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
    except OSError as error:
        raise UserError(f"--output {output}: can't write there ({error.strerror})") from None
    print(f"\nThe page: {output} ({len(page) / 1e6:.1f} MB)")


def main(argv: list[str] | None = None) -> None:
    """Report on the directories on the command line. Raises `UserError` if one holds no run."""
    try:
        report(parse_arguments(argv))
    except UserError as error:  # may quote a path with line breaks
        raise UserError(format_value(str(error))) from None


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small: several threads would wait for each other
    run_script(main)
