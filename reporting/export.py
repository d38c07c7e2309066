"""Prints the comparison for other programs: as CSV, as JSON, or as a table of LaTeX."""

import csv
import json
import math
import sys

from reporting.journal import is_number
from reporting.runs import Collection, RunFiles, Table, format_value, run_table, seed_table

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)


def exported(runs: list[RunFiles]) -> Table:
    """The table of the runs with directories and names in place of the labels."""
    table = run_table(runs)
    table[0][:1] = ["directory", "name"]
    for run, row in zip(runs, table[1:]):
        row[:1] = [str(run.path), run.config.get("name")]
    return table


def print_csv(found: Collection) -> None:
    """Print a row for each run."""
    writer = csv.writer(sys.stdout, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows(exported(found.runs))


def print_json(found: Collection) -> None:
    """Print an object for each run and for each group of seeds or folds."""
    header, *rows = exported(found.runs)
    runs = [dict(zip(header, row)) for row in rows]
    header, *rows = seed_table(found)
    header[0] = "name"
    groups = []
    for row, members in zip(rows, found.seed_groups.values()):
        directories = [str(run.path) for run in members]
        groups.append({"members": directories, **dict(zip(header, row))})
    text = json.dumps({"runs": runs, "groups": groups}, default=vars)
    content = json.loads(text, parse_constant=str)  # NaN is not JSON, "NaN" is
    print(json.dumps(content, indent=2))


def print_latex(found: Collection) -> None:
    """Print a table of the groups of seeds or folds, or of the runs if there are none.

    The best of a column is bold if all runs that have it declare whether lower or higher is better.
    """
    table = run_table(found.runs)
    if found.seed_groups:
        table = seed_table(found)
        if alone := len(found.runs) - sum(map(len, found.seed_groups.values())):
            found.problems.append(f"Runs left out, because they are in no group: {alone}")
    columns = []
    for column in zip(*table):
        numbers = [getattr(cell, "mean", cell) for cell in column]
        finite = [number for number in numbers if is_number(number) and math.isfinite(number)]
        name = column[0]
        signs = {run.sign_of(name) for run in found.runs if name in run.best}
        best = math.nan
        if len(finite) > 1 and signs == {1}:
            best = min(finite)
        elif len(finite) > 1 and signs == {-1}:
            best = max(finite)
        texts = [format_value(cell).translate(LATEX) for cell in column]
        for i, number in enumerate(numbers):
            if is_number(number):
                texts[i] = texts[i].replace("-", "$-$")
            if number == best:
                texts[i] = rf"\textbf{{{texts[i]}}}"
        columns.append(texts)
    # {}: after \\, a bracket at the beginning of a row would be an argument.
    header, *rows = [f"{{}}{' & '.join(row)} \\\\" for row in zip(*columns)]
    print(
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
        r"\toprule",
        header,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        sep="\n",
    )
