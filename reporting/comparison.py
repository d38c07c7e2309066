"""Is one run better than another? Compares runs on examples that both have predicted."""

import html
import math
from collections import Counter, defaultdict
from statistics import NormalDist, mean, stdev

import torch
from torch import Tensor

from harness.errors import UserError
from harness.files import list_names
from metrics import (
    COUNT_METRICS,
    EVALUATION_METRICS,
    evaluation,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    paired_bootstrap_counts,
    permutation_test,
)
from reporting.markup import paragraph, table
from reporting.predictions import (
    MOST_SHOWN,
    Predictions,
    largest_first,
    read_predictions,
    show_examples,
)
from reporting.runs import PREDICTIONS, Collection, SeedGroups, base_name, format_mean

MOST_COMPARED = 20  # runs per metric: each comparison takes about half a second
MOST_GROUPS = 5  # of seeds
CAUTION = (
    "The best was chosen by its figure, which makes it look better than it is. This is about these "
    "trained models: another seed may change the figure of each by as much."
)


def compare_runs(found: Collection, file: str) -> str:
    """The section that compares the best run with the others, and the best group of seeds.

    Runs that monitor the same metric and have predicted the same examples are compared. There is
    none if no run has a `file` of test data.
    """
    comparable = defaultdict(list)  # lists of predictions
    left_out = defaultdict(list)  # labels of runs, by reason
    compared = Counter()  # runs, by metric
    for run in found.runs:
        try:
            if run.metrics is None:
                raise UserError("not finished")
            if run.score is None:
                raise UserError(f"not ranked by {run.monitor}")
            if compared[run.monitor] == MOST_COMPARED:
                raise UserError(f"not among the {MOST_COMPARED} best by {run.monitor}")
            if run.monitor.startswith(("train/", "test/") if file == PREDICTIONS else "train/"):
                raise UserError(f"{run.monitor} is not computed from {file}")
            predictions = read_predictions(run, file)
        except UserError as reason:
            left_out[str(reason)].append(run.label)
        else:
            compared[run.monitor] += 1
            comparable[run.monitor, run.sign, predictions.examples].append(predictions)
    if file != PREDICTIONS and not comparable:
        return ""
    if not any((run.path / file).is_file() for run in found.runs):
        left_out.clear()
    content = compare_seeds(found.seed_groups, file)
    for best, *others in comparable.values():
        if others:
            content += compare_with_best(best, others)
            content += disagreements(best, others[0])
        else:
            reason = "no other run has predicted the same examples and monitors the same metric"
            left_out[reason].append(best.run.label)
    for reason, labels in left_out.items():
        content += paragraph(f"Not compared: {list_names(labels)} ({reason}).", "soft")
    return content and f"<h2>Is one better than another? ({file})</h2>{content}"


def difference(a: Predictions, b: Predictions) -> tuple[float, float, float]:
    """The difference a - b and its 95% interval, by paired bootstrap.

    Of classes, it is the difference in the metric that `a` monitors: NaN if the figures of the runs
    don't follow from their predictions. Of numbers, it is that of the mean absolute errors.
    """
    if a.probabilities is None:
        return float((a.losses - b.losses).mean()), *paired_bootstrap(a.losses, b.losses)
    name = base_name(a.run.monitor)
    known = {name} & EVALUATION_METRICS.keys()
    positive = int(a.run.metrics.get("positive_label") != a.class_names[0])  # of two classes

    def figure(rows: Tensor) -> float:
        result = evaluation(rows[:, :-1], rows[:, -1].long(), known, positive)
        return result.metrics.get(name, math.nan)

    rows_a, rows_b = (torch.column_stack([run.probabilities.log(), run.labels]) for run in (a, b))
    gap = figure(rows_a) - figure(rows_b)
    reported = a.run.best.get(a.metric, math.nan) - b.run.best.get(b.metric, math.nan)
    if not math.isclose(gap, reported, rel_tol=0.01, abs_tol=1e-4):
        return math.nan, math.nan, math.nan
    if name == "loss":
        return gap, *paired_bootstrap(a.losses, b.losses)
    if name in COUNT_METRICS:
        predictions = (a.predictions, b.predictions)
        return gap, *paired_bootstrap_counts(predictions, a.labels, COUNT_METRICS[name])
    return gap, *paired_bootstrap(rows_a, rows_b, figure, resamples=200)  # it is slow


def verdict(metric: str, sign: int, low: float, high: float) -> str:
    """What the interval of the difference, best run minus this one, says."""
    if not math.isfinite(low + high):
        return f"{metric} can't be computed from the predictions"
    if low <= 0 <= high:
        return f"No evidence of a difference in {metric}"
    better = "The best" if sign * low < 0 else "This one"
    return f"{better} is better in {metric}"


def compare_with_best(best: Predictions, others: list[Predictions]) -> str:
    """A table that compares the best run with each other one."""
    has_classes = best.probabilities is not None
    metric = best.metric if has_classes else "mean absolute error"
    sign = best.run.sign if has_classes else 1
    header = ["run", f"{metric}, best minus this", "95% interval from", "to", "in words"]
    method = "Intervals are by paired bootstrap over the examples."
    if has_classes:
        header += ["only the best is right", "only this is right", "McNemar's p"]
        method += " p is by McNemar's exact test of which examples are right."
    pairs = math.comb(len(others) + 1, 2)
    if pairs > 1:
        method += (
            f" Bonferroni's correction is for all {pairs} pairs of these runs, "
            "because the best was chosen."
        )
    # The interval at 1 - 0.05 / pairs, if the difference has a normal distribution.
    widening = NormalDist().inv_cdf(1 - 0.025 / pairs) / NormalDist().inv_cdf(0.975)
    rows = [header]
    for other in others:
        gap, low, high = difference(best, other)
        low = gap - widening * (gap - low)
        high = gap + widening * (high - gap)
        row = [other.run.label, gap, low, high, verdict(metric, sign, low, high)]
        if has_classes:
            only_best, only_this, p = mcnemar_exact(best.correct, other.correct)
            row += [only_best, only_this, min(1.0, pairs * p)]
        rows.append(row)
    introduction = (
        f"The best by {best.run.monitor}, {best.run.label}, beside each other run on the same "
        f"{len(best.labels):,} examples:"
    )
    explanation = paragraph(f"{method} {CAUTION}", "soft")
    return f"{paragraph(introduction)}{table(rows)}{explanation}"


def compare_seeds(seed_groups: SeedGroups, file: str = PREDICTIONS) -> str:
    """Paragraphs on the best group of seeds against others with the same examples and metric."""
    comparable = defaultdict(list)
    for name, members in seed_groups.items():
        first = members[0]
        metric = first.metric_in(file)
        values = [run.best.get(metric, math.nan) for run in members]
        shown_before = file != PREDICTIONS and metric == first.monitor
        if first.sign and not shown_before and all(map(math.isfinite, values)):
            try:
                examples = read_predictions(first, file).examples
            except UserError:
                examples = str(first.config.get("dataset"))
            comparable[metric, first.sign, examples].append((name, values))
    content = ""
    for (metric, sign, _), ranked in comparable.items():
        ranked.sort(key=lambda group: sign * mean(group[1]))
        (best, values), *others = ranked[: MOST_GROUPS + 1]
        pairs = math.comb(len(ranked), 2)  # all of them, because the best was chosen
        p_values = [permutation_test(values, other_values) for _, other_values in others]
        for (name, other_values), p in zip(others, holm(p_values, pairs)):
            if p <= 0.05:
                found = f"{best} is better in {metric} than {name}"
            else:
                found = f"no evidence of a difference in {metric} between {best} and {name}"
            content += paragraph(
                f"Over seeds or folds, {found}: {format_mean(mean(values), stdev(values))} "
                f"(n = {len(values)}) and {format_mean(mean(other_values), stdev(other_values))} "
                f"(n = {len(other_values)}), permutation test of the means, "
                f"p = {p:.2g} with Holm's correction for all pairs of groups ({pairs}). "
                "With three runs each, p can't be below 0.1."
            )
    return content


def disagreements(a: Predictions, b: Predictions) -> str:
    """The examples on which only one of two runs is right or closer, by how much they differ."""
    content = ""
    for better, worse in ((a, b), (b, a)):
        gain = worse.losses - better.losses
        if a.probabilities is None:
            heading = f"{better.run.label} is closer than {worse.run.label}: "
            chosen = gain > 0
        else:
            heading = f"{better.run.label} right, {worse.run.label} wrong: "
            chosen = better.correct & ~worse.correct
        chosen = largest_first(gain, chosen)
        heading += f"{len(chosen):,} examples, here up to {MOST_SHOWN}, by how much they differ"
        content += f"<h3>{html.escape(heading)}</h3>{show_examples(worse, chosen, better)}"
    return content
