"""Is one run better than another? Compares runs on validation examples that both have predicted."""

import html
import math
from collections import Counter, defaultdict
from statistics import mean

import torch
from torch import Tensor

from harness.errors import UserError
from metrics import (
    EVALUATION_METRICS,
    evaluation,
    mcnemar_exact,
    paired_bootstrap,
    paired_bootstrap_counts,
    permutation_test,
)
from reporting.markup import counted, details, paragraph, table
from reporting.predictions import Predictions, read_predictions, show_examples
from reporting.runs import RunFiles, SeedGroups, format_mean, one_per_seed, sort_key

MOST_COMPARED = 20  # runs per metric: each comparison takes about half a second
MOST_GROUPS = 5  # of seeds
MOST_SHOWN = 24  # examples
CAUTION = "This is about the trained models as they are: another seed may move each of them as far."
ALONE = "no other run has predicted the same validation examples and monitors the same metric"


def compare_runs(runs: list[RunFiles], seed_groups: SeedGroups) -> str:
    """The section that compares the best run with the others, and the best group of seeds."""
    sets, left_out = comparable_runs(runs)
    content = f"<h2>Is one better than another?</h2>{compare_seeds(seed_groups)}"
    for best, *others in sets:
        if len(sets) > 1:
            content += (
                f"<h3>{html.escape(best.run.dataset)}, by {html.escape(best.run.monitor)}</h3>"
            )
        if len(others) == 1:
            content += compare_two(best, others[0])
        else:
            content += compare_many(best, others)
        rival = others[0]
        for members in seed_groups.values():
            if best.run in members:
                rival = next((other for other in others if other.run not in members), rival)
        content += disagreements(best, rival)
    for reason, labels in left_out.items():
        names = ", ".join(labels[:5])
        if len(labels) > 5:
            names += f" and {len(labels) - 5} more"
        content += paragraph(f"Not compared: {names} ({reason}).", "soft")
    return content


def comparable_runs(
    runs: list[RunFiles],
) -> tuple[list[list[Predictions]], dict[str, list[str]]]:
    """Sets of two or more runs, best first, that monitor the same metric on the same examples.

    The second value has the labels of the runs that are in no set, by reason.
    """
    sets = defaultdict(list)
    left_out = defaultdict(list)
    compared = Counter()  # runs, by metric
    for run in runs:
        try:
            if run.metrics is None:
                raise UserError("not finished")
            if compared[run.monitor] == MOST_COMPARED:
                raise UserError(f"not among the {MOST_COMPARED} best by {run.monitor}")
            predictions = read_predictions(run)
        except UserError as reason:
            left_out[str(reason)].append(run.label)
        else:
            compared[run.monitor] += 1
            sets[run.monitor, run.dataset, predictions.examples].append(predictions)
    for members in sets.values():
        if len(members) == 1:
            left_out[ALONE].append(members[0].run.label)
    return [members for members in sets.values() if len(members) > 1], left_out


def difference(a: Predictions, b: Predictions) -> tuple[float, float, float]:
    """The difference a - b in the metric that `a` monitors, and its 95% interval.

    NaN if it can't be computed from the predictions.
    """
    name = a.run.monitor.rpartition("/")[2]
    if name == "loss":
        return float((a.losses - b.losses).mean()), *paired_bootstrap(a.losses, b.losses)

    def figure(rows: Tensor) -> float:
        log_probabilities = rows[:, :-1].clamp(min=1e-300).log()
        labels = rows[:, -1].long()
        return evaluation(log_probabilities, labels).metrics.get(name, math.nan)

    rows_a, rows_b = (torch.cat([run.probabilities, run.labels[:, None]], 1) for run in (a, b))
    gap = figure(rows_a) - figure(rows_b)
    if not math.isfinite(gap):
        return math.nan, math.nan, math.nan
    metric = EVALUATION_METRICS[name]
    if metric.of_counts:
        predictions = (a.predictions, b.predictions)
        return gap, *paired_bootstrap_counts(predictions, a.labels, metric.compute)
    return gap, *paired_bootstrap(rows_a, rows_b, figure, resamples=200)  # it is slow


def verdict(a: str, b: str, metric: str, interval: tuple[float, float]) -> str:
    """What the interval of the difference a - b says."""
    low, high = interval
    if not math.isfinite(low + high):
        return f"{metric} can't be computed from predictions.csv"
    if low <= 0 <= high:
        return f"No evidence of a difference in {metric}"
    better = a if sort_key(low, metric) < 0 else b
    return f"{better} is better in {metric}"


def compare_two(a: Predictions, b: Predictions) -> str:
    """Two runs compared in sentences."""
    metric = a.run.monitor
    gap, low, high = difference(a, b)
    sentences = ""
    if math.isfinite(gap):
        sentences = (
            f"{metric} of {a.run.label} minus that of {b.run.label} is {gap:+.4g}, "
            f"95% interval {low:+.4g} to {high:+.4g} (paired bootstrap). "
        )
    test = mcnemar_exact(a.correct, b.correct)
    found = "no evidence of a difference" if test.p_value > 0.05 else "a difference"
    sentences += (
        f"Of the same {counted(len(a.labels), 'validation example')}, only {a.run.label} is right "
        f"on {test.only_a:,} and only {b.run.label} on {test.only_b:,}: {found} in accuracy "
        f"(McNemar's exact test, p = {test.p_value:.2g})."
    )
    conclusion = verdict(a.run.label, b.run.label, metric, (low, high)) + "."
    return f"{paragraph(conclusion, 'verdict')}{paragraph(sentences)}{paragraph(CAUTION, 'soft')}"


def compare_many(best: Predictions, others: list[Predictions]) -> str:
    """A table that compares the best run with each other one."""
    metric = best.run.monitor
    rows = []
    for other in others:
        gap, low, high = difference(best, other)
        interval = (low, f"{low:+.4g} to {high:+.4g}") if math.isfinite(gap) else None
        conclusion = verdict("The best", "This one", metric, (low, high))
        test = mcnemar_exact(best.correct, other.correct)
        rows.append([other.run.label, gap, interval, *test, conclusion])
    header = [
        "run",
        f"{metric}, best minus this",
        "95% interval",
        "only the best is right",
        "only this is right",
        "McNemar's p",
        "in words",
    ]
    introduction = (
        f"The best by {metric}, {best.run.label}, beside each other run on the same "
        f"{counted(len(best.labels), 'validation example')}:"
    )
    method = (
        "Intervals are by paired bootstrap over the examples, p by McNemar's exact test of which "
        "examples are right. The best of several was chosen for its figure, which flatters it. "
        f"{CAUTION}"
    )
    return f"{paragraph(introduction)}{table(header, rows)}{paragraph(method, 'soft')}"


def compare_seeds(seed_groups: SeedGroups) -> str:
    """Paragraphs on the best group of seeds against others with the same data set and metric."""
    comparable = defaultdict(list)
    for name, members in seed_groups.items():
        metric = members[0].monitor
        values = [run.best.get(metric, math.nan) for run in one_per_seed(members)]
        if len(values) > 1 and all(map(math.isfinite, values)):
            comparable[metric, members[0].dataset].append((name, values))
    content = ""
    for (metric, _), ranked in comparable.items():
        ranked.sort(key=lambda group: sort_key(mean(group[1]), metric))
        (best, values), *others = ranked
        for name, other_values in others[:MOST_GROUPS]:
            p = permutation_test(values, other_values)
            if p <= 0.05:
                found = f"{best} is better in {metric} than {name}"
            else:
                found = f"no evidence of a difference in {metric} between {best} and {name}"
            least = 1 / math.comb(len(values) + len(other_values), len(values))
            if len(values) == len(other_values):
                least *= 2  # swapping two groups of one size changes nothing
            few = f"; with so few runs it can't be below {least:.2g}" if least > 0.05 else ""
            content += paragraph(
                f"Over seeds, {found}: {format_mean(values)} (n = {len(values)}) and "
                f"{format_mean(other_values)} (n = {len(other_values)}), "
                f"permutation test of the means, p = {p:.2g}{few}."
            )
    return content


def disagreements(a: Predictions, b: Predictions) -> str:
    """The examples that only one of two runs gets right, by how much they differ on them."""
    content = ""
    for right, wrong in ((a, b), (b, a)):
        chosen = (right.correct & ~wrong.correct).nonzero().flatten()
        labels = right.labels[chosen]
        margin = right.probabilities[chosen, labels] - wrong.probabilities[chosen, labels]
        chosen = chosen[margin.argsort(descending=True, stable=True)].tolist()
        heading = f"{right.run.label} right, {wrong.run.label} wrong: "
        heading += counted(len(chosen), "example")
        if len(chosen) > MOST_SHOWN:
            heading += f", the {MOST_SHOWN} on which they differ most"
        examples = show_examples(wrong, chosen[:MOST_SHOWN], right)
        content += details(heading, examples, is_open=bool(chosen))
    return content
