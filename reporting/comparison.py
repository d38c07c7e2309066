"""Is one run better than another? Runs are compared on the validation examples that both have predicted."""

import html
import math
from statistics import mean, stdev

import torch

from harness.errors import UserError
from metrics import (
    EVALUATION_METRICS,
    evaluation,
    lower_is_better,
    mcnemar_exact,
    paired_bootstrap,
    paired_bootstrap_counts,
    permutation_test,
)
from reporting.markup import cell, counted, details, paragraph, table
from reporting.predictions import Predictions, read_predictions, show_examples
from reporting.runs import Run, one_per_seed, text

MOST_COMPARED = 20  # runs per metric: each comparison takes about half a second
MOST_GROUPS = 5  # of seeds
MOST_SHOWN = 24  # examples
CAUTION = "This is about the trained models as they are: another seed may move each of them as far."

Predicted = tuple[Run, Predictions]


def compare_runs(runs: list[Run], seeds: dict[str, list[Run]]) -> str:
    """The section of the page: the best run beside the others, and the best group of seeds beside the other groups."""
    sets, left_out = comparable_runs(runs)
    parts = ["<h2>Is one better than another?</h2>", *compare_seeds(seeds)]
    for best, *others in sets:
        if len(sets) > 1:
            heading = f"{text(best[0].config.get('dataset'))}, by {best[0].monitor}"
            parts.append(f"<h3>{html.escape(heading)}</h3>")
        parts.append(pair(best, others[0]) if len(others) == 1 else best_of_many(best, others))
        family = next((members for members in seeds.values() if best[0] in members), [])
        parts.append(
            disagreements(
                best, next((other for other in others if other[0] not in family), others[0])
            )
        )
    for reason, names in left_out.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        parts.append(paragraph(f"Not compared: {', '.join(names[:5])}{more} ({reason}).", "soft"))
    return "".join(parts)


def comparable_runs(runs: list[Run]) -> tuple[list[list[Predicted]], dict[str, list[str]]]:
    """The runs, which are sorted from the best, in sets that monitor the same metric on the same examples.

    The second value has the names of those that are in no set, by reason.
    """
    sets: dict[tuple[str, str, str], list[Predicted]] = {}
    left_out: dict[str, list[str]] = {}
    for run in runs:
        try:
            if run.metrics is None:
                raise UserError("not finished")
            if (
                sum(len(members) for (metric, *_), members in sets.items() if metric == run.monitor)
                >= MOST_COMPARED
            ):
                raise UserError(f"not among the {MOST_COMPARED} best by {run.monitor}")
            predictions = read_predictions(run.path)
            same = (run.monitor, text(run.config.get("dataset")), predictions.examples)
            sets.setdefault(same, []).append((run, predictions))
        except UserError as reason:
            left_out.setdefault(str(reason), []).append(text(run.label))
    alone = [text(members[0][0].label) for members in sets.values() if len(members) == 1]
    if alone:
        left_out[
            "no other run has predicted the same validation examples and monitors the same metric"
        ] = alone
    return [members for members in sets.values() if len(members) > 1], left_out


def difference(a: Predictions, b: Predictions, name: str) -> tuple[float, float, float]:
    """The difference a - b of a metric such as "mcc", and its 95% interval; NaN if it can't be computed from these."""
    if name == "loss":
        return float((a.losses - b.losses).mean()), *paired_bootstrap(a.losses, b.losses)
    figures = [
        evaluation(of.probabilities.clamp(min=1e-300).log(), of.labels).metrics.get(name, math.nan)
        for of in (a, b)
    ]
    if not all(map(math.isfinite, figures)):
        return math.nan, math.nan, math.nan
    metric = EVALUATION_METRICS[name]
    if metric.of_counts:
        interval = paired_bootstrap_counts((a.predictions, b.predictions), a.labels, metric.compute)
    else:
        rows = [torch.cat([of.probabilities, of.labels[:, None]], 1) for of in (a, b)]
        statistic = lambda rows: evaluation(
            rows[:, :-1].clamp(min=1e-300).log(), rows[:, -1].long()
        ).metrics[name]
        interval = paired_bootstrap(*rows, statistic, resamples=200)  # it is slow
    return figures[0] - figures[1], *interval


def verdict(a: str, b: str, metric: str, interval: tuple[float, float]) -> str:
    """What the interval of the difference a - b says."""
    low, high = interval
    if not math.isfinite(low + high):
        return f"{metric} can't be computed from predictions.csv"
    if low <= 0 <= high:
        return f"No evidence of a difference in {metric}"
    return f"{a if (low > 0) != lower_is_better(metric) else b} is better in {metric}"


def pair(a: Predicted, b: Predicted) -> str:
    """Two runs compared in sentences."""
    (run_a, of_a), (run_b, of_b) = a, b
    name_a, name_b, metric = text(run_a.label), text(run_b.label), run_a.monitor
    gap, *interval = difference(of_a, of_b, metric.rpartition("/")[2])
    test = mcnemar_exact(of_a.correct, of_b.correct)
    words = (
        f"{metric} of {name_a} minus that of {name_b} is {gap:+.4g}, 95% interval {interval[0]:+.4g} to "
        f"{interval[1]:+.4g} (paired bootstrap). " if math.isfinite(gap) else ""
    )  # fmt: skip
    words += (
        f"Of the same {counted(len(of_a.labels), 'validation example')}, only {name_a} is right on "
        f"{test.only_a:,} and only {name_b} on {test.only_b:,}: "
        f"{'no evidence of a difference' if test.p_value > 0.05 else 'a difference'} in accuracy "
        f"(McNemar's exact test, p = {test.p_value:.2g})."
    )
    found = paragraph(verdict(name_a, name_b, metric, interval) + ".", "verdict")
    return found + paragraph(words) + paragraph(CAUTION, "soft")


def best_of_many(best: Predicted, others: list[Predicted]) -> str:
    """A table of the best run beside each other one."""
    run, of = best
    rows = []
    for other, of_other in others:
        gap, *interval = difference(of, of_other, run.monitor.rpartition("/")[2])
        shown = (
            cell(interval[0], f"{interval[0]:+.4g} to {interval[1]:+.4g}")
            if math.isfinite(gap)
            else None
        )
        words = verdict("The best", "This one", run.monitor, interval)
        rows.append([other.label, gap, shown, *mcnemar_exact(of.correct, of_other.correct), words])
    header = [
        "run",
        f"{run.monitor}, best minus this",
        "95% interval",
        "only the best is right",
        "only this is right",
    ]
    lead = f"The best by {run.monitor}, {text(run.label)}, beside each other run on the same "
    method = (
        "Intervals are by paired bootstrap over the examples, p by McNemar's exact test of which examples are right. "
        f"The best of several was chosen for its figure, which flatters it. {CAUTION}"
    )
    lead = paragraph(lead + f"{counted(len(of.labels), 'validation example')}:")
    return lead + table([*header, "McNemar's p", "in words"], rows) + paragraph(method, "soft")


def compare_seeds(seeds: dict[str, list[Run]]) -> list[str]:
    """Sentences on the best group of seeds beside each other group of the same data set and monitored metric."""
    kinds: dict[tuple[str, str], list[tuple[str, list[float]]]] = {}
    for name, members in seeds.items():
        metric = members[0].monitor
        values = [run.best.get(metric, math.nan) for run in one_per_seed(members)]
        if len(values) > 1 and all(map(math.isfinite, values)):
            kinds.setdefault((metric, text(members[0].config.get("dataset"))), []).append(
                (text(name), values)
            )
    sentences = []
    for (metric, _), ranked in kinds.items():
        ranked.sort(key=lambda group: mean(group[1]), reverse=not lower_is_better(metric))
        (best, values), *others = ranked
        for name, other in others[:MOST_GROUPS]:
            p, splits = (
                permutation_test(values, other),
                math.comb(len(values) + len(other), len(values)),
            )
            least = (
                1 + (len(values) == len(other))
            ) / splits  # swapping two groups of one size changes nothing
            found = f"{best} is better in {metric} than {name}"
            none = f"no evidence of a difference in {metric} between {best} and {name}"
            few = f"; with so few runs it can't be below {least:.2g}" if least > 0.05 else ""
            sentences.append(paragraph(
                f"Over seeds, {found if p <= 0.05 else none}: {mean(values):.4g} ± {stdev(values):.2g} "
                f"(n = {len(values)}) and {mean(other):.4g} ± {stdev(other):.2g} (n = {len(other)}), "
                f"permutation test of the means, p = {p:.2g}{few}."
            ))  # fmt: skip
    return sentences


def disagreements(a: Predicted, b: Predicted) -> str:
    """The examples that only one of two runs gets right, those first on which they differ most."""
    parts = []
    for (right, good), (wrong, bad) in ((a, b), (b, a)):
        chosen = (good.correct & ~bad.correct).nonzero().flatten()
        labels = good.labels[chosen]
        margin = good.probabilities[chosen, labels] - bad.probabilities[chosen, labels]
        chosen = chosen[margin.argsort(descending=True, stable=True)].tolist()
        heading = f"{text(right.label)} right, {text(wrong.label)} wrong: {counted(len(chosen), 'example')}"
        heading += (
            f", the {MOST_SHOWN} on which they differ most" if len(chosen) > MOST_SHOWN else ""
        )
        parts.append(
            details(
                heading,
                show_examples(wrong, bad, chosen[:MOST_SHOWN], beside=good),
                opened=bool(chosen),
            )
        )
    return "".join(parts)
