"""Compare runs, or view a sweep or one run, without an account: python report.py RUN_DIRECTORY...

Prints the runs as a table and writes a page with their curves and comparison, report.html, that
opens from disk.
"""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

from harness.errors import UserError
from harness.files import write_text
from harness.options import Parser, command_line
from harness.script import in_ipython, run_script

if __name__ == "__main__" and not in_ipython():
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from reporting.charts import curves, describe
from reporting.collection import collect
from reporting.export import print_csv, print_json, print_latex
from reporting.runs import Collection, Table, format_value, run_table, seed_table


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command-line arguments."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="RUN_DIRECTORY",
        help="of a run, of a sweep, or of several runs",
    )
    parser.add_argument("--metric", help="what to compare [the monitored metric]")
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument(
        "--output", type=Path, default="report.html", help="the page to write [report.html]"
    )
    outputs.add_argument("--watch", action="store_true", help="serve the page while runs go on")
    for name, export in (("csv", print_csv), ("json", print_json), ("latex", print_latex)):
        outputs.add_argument(
            f"--{name}",
            action="store_const",
            const=export,
            dest="export",
            help=f"print the comparison as {name}, and write no page",
        )
    parser.add_argument("--host", default="127.0.0.1", help="to serve on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=0, help="to serve on [0: a free one]")
    arguments = parser.parse_args(command_line(__name__) if argv is None else argv)
    if (arguments.host, arguments.port) != ("127.0.0.1", 0) and not arguments.watch:
        raise UserError("--host and --port are for --watch")
    return arguments


def shorten(text: str) -> str:
    """A long text without its middle: the names of runs often differ at their ends."""
    return text if len(text) <= 80 else f"{text[:40]}…{text[-39:]}"


def print_table(rows: Table) -> None:
    """Print a table in columns."""
    columns = []
    for column in zip(*rows):
        cells = [shorten(format_value(value)) for value in column]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) for cell in cells])
    for row in zip(*columns):
        print("  ".join(row).rstrip())


def print_tables(found: Collection) -> None:
    """Print what was found: the runs, means over seeds or folds, and what is wrong."""
    print_table(run_table(found.runs))
    if found.seed_groups:
        print()
        print_table(seed_table(found))
    command = found.runs[0].config.get("command")
    if command and len(found.runs) == 1:
        print(f"command: {format_value(command)}")
    for problem in found.problems:
        print(problem)


def main(argv: list[str] | None = None) -> None:
    """Print the table and write the page. Raises `UserError` if a directory holds no run."""
    arguments = parse_arguments(argv)
    output = arguments.output
    look = partial(collect, arguments.directories, arguments.metric)
    found = look()
    if arguments.export:
        arguments.export(found)
        for problem in found.problems:
            print(problem, file=sys.stderr)
        return
    if not arguments.watch:
        print_tables(found)
    try:
        from reporting.page import BEGINNING, make_page, show_tables
        from reporting.server import serve
    except ImportError as error:
        raise UserError(
            f"no page without plotly ({error}): pip install -r requirements-report.txt"
        ) from None
    if arguments.watch:
        serve(found, look, arguments.host, arguments.port)
        return
    if output.is_file() and not output.read_bytes().startswith(BEGINNING.encode()):
        raise UserError(f"--output {output} is not a report; choose another name")
    # It imports torch, which takes a second and much memory; --watch does without.
    from reporting.analysis import analyze

    for run in found.runs:
        run.log.read(run.config)
    data = describe(found)
    data["curves"] = curves(found.runs, {metric: {} for metric in data["metrics"]})
    page = make_page(len(found.runs), data, tables=show_tables(found), **analyze(found))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
    except OSError as error:
        raise UserError(f"--output {output}: can't write there ({error.strerror})") from None
    print(f"\nThe page: {output}")


if __name__ == "__main__":
    run_script(main)
