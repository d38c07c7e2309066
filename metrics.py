"""Classification metrics and statistical tests, computed from their definitions.

If a definition divides by zero or a class never occurs, a metric is scikit-learn's default.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Interval = tuple[float, float]  # low, high
PER_CLASS = [  # columns of a table
    "class",
    "precision",
    "recall",
    "f1",
    "examples",
]
MAX_SPLITS = 20_000  # of a permutation test


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, kept on `device` in O(num_classes²) memory.

    `counts` is int64 (num_classes, num_classes) with a row per label. `a + b` is a new matrix with
    the counts of both, for example of two parts of a data set. The metrics are computed on the CPU,
    and raise `ValueError` if no examples have been counted.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: two int64 tensors of the same shape, on this matrix's device.

        Raises `ValueError` if shapes or dtypes are wrong, or if a value is outside
        0 .. num_classes - 1. That check synchronizes with an accelerator.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} "
                "differ in shape"
            )
        if not predictions.dtype == labels.dtype == torch.int64:
            raise ValueError(
                f"predictions and labels must be int64, got {predictions.dtype} and {labels.dtype}"
            )
        last = self.num_classes - 1
        if not _all_within(labels, 0, last):
            raise ValueError(f"labels contain a value outside 0..{last}")
        if not _all_within(predictions, 0, last):
            raise ValueError(f"predictions contain a value outside 0..{last}")
        one = self.counts.new_ones(())
        self.counts.index_put_((labels, predictions), one, accumulate=True)

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        merged = ConfusionMatrix(self.num_classes)
        merged.counts = self.counts + other.counts.to(self.counts.device)
        return merged

    def _totals(self) -> Tensor:
        """Correct predictions, labels and predictions of each class, float64 (3, num_classes), CPU.

        Raises `ValueError` if no examples have been counted.
        """
        counts = self.counts.cpu()
        totals = torch.stack([counts.diagonal(), counts.sum(1), counts.sum(0)])
        if not totals.any():
            raise ValueError("no examples have been counted")
        return totals.double()

    def accuracy(self) -> float:
        """The share of correct predictions."""
        hits, labelled, _ = self._totals()
        return float(hits.sum() / labelled.sum())

    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that occur in the labels."""
        hits, labelled, _ = self._totals()
        recall = hits / labelled
        return float(recall[labelled > 0].mean())

    def majority_share(self) -> float:
        """The share of the most frequent label: the accuracy of always predicting it."""
        _, labelled, _ = self._totals()
        return float(labelled.max() / labelled.sum())

    def precision(self, average: str | None) -> float | Tensor:
        """TP / (TP + FP). `average` is "macro", "micro", "weighted" or None, as in `_average`."""
        hits, _, predicted = self._totals()
        return self._average(hits, predicted, average)

    def recall(self, average: str | None) -> float | Tensor:
        """TP / (TP + FN). `average` as in `precision`."""
        hits, labelled, _ = self._totals()
        return self._average(hits, labelled, average)

    def f1(self, average: str | None) -> float | Tensor:
        """The harmonic mean of precision and recall, 2·TP / (2·TP + FP + FN).

        `average` as in `precision`.
        """
        hits, labelled, predicted = self._totals()
        return self._average(2 * hits, labelled + predicted, average)

    def _average(
        self,
        numerator: Tensor,
        denominator: Tensor,
        average: str | None,
    ) -> float | Tensor:
        """Average numerator / denominator over the classes; 0 / 0 counts as 0.

        "macro": unweighted mean over the classes that occur in labels or predictions. "weighted":
        mean weighted by the number of labels per class. "micro": sum of numerators / sum of
        denominators. None: no average, float64 (num_classes,). Raises `ValueError` for anything
        else.
        """
        _, labelled, predicted = self._totals()
        per_class = (numerator / denominator).nan_to_num()
        if average is None:
            return per_class
        if average == "macro":
            occurs = labelled + predicted > 0
            return float(per_class[occurs].mean())
        if average == "weighted":
            return float((per_class * labelled).sum() / labelled.sum())
        if average == "micro":
            return float(numerator.sum() / denominator.sum())
        raise ValueError(f'average must be "macro", "micro", "weighted" or None, got {average!r}')

    def per_class(self, class_names: Sequence[str]) -> list[tuple]:
        """A row for each class: its name and the other columns in `PER_CLASS`."""
        figures = [self.precision(None), self.recall(None), self.f1(None), self.counts.sum(1)]
        return list(zip(class_names, *(values.tolist() for values in figures)))

    def matthews_corrcoef(self) -> float:
        """Correlation of labels and predictions, in -1 .. 1; 0 if either has only one class.

        The multi-class form R_K of Gorodkin, "Comparing two K-category assignments by a K-category
        correlation coefficient", 2004, eq. 8.
        """
        hits, labelled, predicted = self._totals()
        total = labelled.sum()
        covariance = hits.sum() * total - labelled @ predicted
        label_variance = total**2 - labelled @ labelled
        prediction_variance = total**2 - predicted @ predicted
        correlation = covariance / (label_variance * prediction_variance).sqrt()
        return float(correlation.nan_to_num())

    def cohen_kappa(self) -> float:
        """Agreement of labels and predictions beyond chance.

        NaN if all labels and predictions are the same class. Cohen, "A coefficient of agreement for
        nominal scales", 1960.
        """
        hits, labelled, predicted = self._totals()
        total = labelled.sum()
        expected_hits = labelled @ predicted / total
        return float((hits.sum() - expected_hits) / (total - expected_hits))


def _all_within(values: Tensor, low: float, high: float) -> bool:
    """Whether all values are in low .. high; NaN is not."""
    return torch.equal(values, values.clamp(low, high))


class Evaluation(NamedTuple):
    """A model's predictions on a data split, on the CPU, and their metrics."""

    labels: Tensor  # int64 (examples,)
    predictions: Tensor  # int64 (examples,)
    logits: Tensor  # float32 (examples, classes)
    probabilities: Tensor  # float64 (examples, classes)
    losses: Tensor  # float64 (examples,): cross-entropy in nats
    confusion: ConfusionMatrix
    metrics: dict[str, float]  # by name, as in EVALUATION_METRICS
    positive: int  # the positive class, if there are two

    def named(self, prefix: str, class_names: Sequence[str] = ()) -> dict[str, float]:
        """The metrics with prefixed names: "valid/loss", "valid/acc", ... for "valid".

        With `class_names`, also the share of the most frequent class, "valid/majority_share", and
        the figures of each class, "valid/precision/cat", ...
        """
        named = {f"{prefix}/{name}": value for name, value in self.metrics.items()}
        if class_names:
            named[f"{prefix}/majority_share"] = self.confusion.majority_share()
        for name, *figures in self.confusion.per_class(class_names):
            for figure, value in zip(PER_CLASS[1:], figures):
                named[f"{prefix}/{figure}/{name}"] = value
        return named

    def one_against_rest(self, label: int) -> tuple[Tensor, Tensor]:
        """Scores and labels of a binary problem, as for `roc_curve`: is it the class `label`?"""
        return self.probabilities[:, label], self.labels == label

    def columns(self) -> dict[str, list]:
        """Columns of a table with a row per example: class indices, probabilities and loss."""
        columns = {
            "label": self.labels.tolist(),
            "prediction": self.predictions.tolist(),
        }
        for label, probabilities in enumerate(self.probabilities.T):
            columns[f"probability_{label}"] = probabilities.tolist()
        columns["loss"] = self.losses.tolist()
        return columns


COUNT_METRICS = {  # functions of a `ConfusionMatrix`
    "acc": ConfusionMatrix.accuracy,
    "balanced_acc": ConfusionMatrix.balanced_accuracy,
    "precision_macro": lambda confusion: confusion.precision("macro"),
    "recall_macro": lambda confusion: confusion.recall("macro"),
    "f1_macro": lambda confusion: confusion.f1("macro"),
    "precision_micro": lambda confusion: confusion.precision("micro"),
    "recall_micro": lambda confusion: confusion.recall("micro"),
    "f1_micro": lambda confusion: confusion.f1("micro"),
    "mcc": ConfusionMatrix.matthews_corrcoef,
}
BINARY_METRICS = (  # need two classes, both in the labels
    "roc_auc",
    "average_precision",
)
EVALUATION_METRICS = {  # the others are functions of an `Evaluation`
    "loss": lambda result: float(result.losses.mean()),
    **COUNT_METRICS,
    "ece": lambda result: expected_calibration_error(result.probabilities, result.labels),
    "roc_auc": lambda result: roc_auc(*result.one_against_rest(result.positive)),
    "average_precision": lambda result: average_precision(
        *result.one_against_rest(result.positive)
    ),
}


def evaluation(
    logits: Tensor,
    labels: Tensor,
    names: Iterable[str] = EVALUATION_METRICS,
    positive: int = 1,
) -> Evaluation:
    """Evaluate logits, float (examples, classes), against labels, int64 (examples,).

    The result has the metrics in `names` that are defined for these labels; if the model has
    diverged, that is only the loss. `positive` is the positive class if there are two. Computed in
    float64, so that metrics recomputed from the probabilities agree. Raises `ValueError` if a name
    is unknown, or if shapes, dtypes or the range of the labels are wrong.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (examples, classes), got {tuple(logits.shape)}")
    logits = logits.float().cpu()
    labels = labels.cpu()
    predictions = logits.argmax(1)
    confusion = ConfusionMatrix(logits.shape[1])
    confusion.update(predictions, labels)
    log_probabilities = logits.double().log_softmax(1)
    probabilities = log_probabilities.exp()
    losses = F.nll_loss(log_probabilities, labels, reduction="none")
    result = Evaluation(
        labels,
        predictions,
        logits,
        probabilities,
        losses,
        confusion,
        metrics={},
        positive=positive,
    )
    has_diverged = not losses.isfinite().all()
    both_occur = confusion.num_classes == 2 and len(labels.unique()) == 2
    for name in names:
        if name not in EVALUATION_METRICS:
            raise ValueError(f"unknown metric {name!r}, known are {', '.join(EVALUATION_METRICS)}")
        if has_diverged and name != "loss":
            continue
        if name in BINARY_METRICS and not both_occur:
            continue
        subject = confusion if name in COUNT_METRICS else result
        result.metrics[name] = EVALUATION_METRICS[name](subject)
    return result


def roc_curve(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positive rates of the classifier "score >= threshold", by falling threshold.

    `scores` is float (n,), `labels` is integer (n,) of 0 and 1. Returns float64 `fpr, tpr,
    thresholds`. The curve starts at (0, 0) with an infinite threshold. Tied scores share a point.
    Points in the middle of a straight line of equal steps are dropped. A rate is NaN if its class
    does not occur. Raises `ValueError` if shapes or labels are wrong or a score is not finite.
    Fawcett, "An introduction to ROC analysis", 2006, algorithm 1.
    """
    thresholds, counts = _cumulative_counts(scores, labels)
    keep = torch.ones_like(thresholds, dtype=torch.bool)
    keep[1:-1] = counts.diff(n=2).any(0)  # the curve bends
    true_positives, false_positives = F.pad(counts[:, keep], (1, 0))
    fpr = false_positives / false_positives[-1]
    tpr = true_positives / true_positives[-1]
    thresholds = F.pad(thresholds[keep], (1, 0), value=torch.inf)
    return fpr, tpr, thresholds


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve by the trapezoidal rule; NaN if only one class occurs.

    Arguments and errors as in `roc_curve`.
    """
    fpr, tpr, _ = roc_curve(scores, labels)
    return float(torch.trapezoid(tpr, fpr))


def precision_recall_curve(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision and recall of the classifier "score >= threshold", by rising threshold.

    Arguments and errors as in `roc_curve`. Returns float64 `precision, recall, thresholds`; the
    first two have one more element, the point (1, 0), which has no threshold. Recall is 1
    throughout if there is no positive label.
    """
    thresholds, counts = _cumulative_counts(scores, labels)
    true_positives = counts[0]
    precision = true_positives / counts.sum(0)
    recall = (true_positives / true_positives[-1]).nan_to_num(1.0)
    precision = F.pad(precision.flip(0), (0, 1), value=1.0)
    recall = F.pad(recall.flip(0), (0, 1))
    return precision, recall, thresholds.flip(0)


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Sum over thresholds of precision × increase in recall; 0 if there is no positive label.

    There is no interpolation. Arguments and errors as in `roc_curve`.
    """
    precision, recall, _ = precision_recall_curve(scores, labels)
    increases = -recall.diff()
    return float((increases * precision[:-1]).sum())


def _cumulative_counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct scores in falling order, and how many positives and negatives score at least that.

    Both are float64 on the CPU, (n,) and (2, n). Arguments and errors as in `roc_curve`.
    """
    _check_shapes("scores (n,)", 1, scores, labels)
    scores = scores.cpu().double()
    labels = labels.cpu()
    if not scores.isfinite().all():
        raise ValueError("scores contain NaN or infinity")
    if not set(labels.unique().tolist()) <= {0, 1}:
        raise ValueError("labels must be 0 or 1")
    thresholds, index, examples = scores.unique(return_inverse=True, return_counts=True)
    positives = torch.bincount(index, labels.double())
    counts = torch.stack([positives, examples - positives])
    return thresholds.flip(0), counts.flip(1).cumsum(1)


def _check_shapes(
    expected: str,
    dimensions: int,
    values: Tensor,
    labels: Tensor,
) -> None:
    """Raise `ValueError` unless `values` has that many dimensions, and a row per label."""
    if values.ndim != dimensions or labels.shape != values.shape[:1] or not len(labels):
        raise ValueError(
            f"expected {expected} and labels (n,) with n > 0, "
            f"got {tuple(values.shape)} and {tuple(labels.shape)}"
        )


def expected_calibration_error(
    probabilities: Tensor,
    labels: Tensor,
    bins: int = 15,
) -> float:
    """Mean |accuracy - confidence| over the bins of `calibration`, weighted by examples per bin.

    Guo et al., "On calibration of modern neural networks", 2017, eq. 3.
    """
    counts, confidences, accuracies = calibration(probabilities, labels, bins)
    gaps = (accuracies - confidences).abs()
    return float((counts * gaps).sum() / counts.sum())


def calibration(
    probabilities: Tensor,
    labels: Tensor,
    bins: int = 15,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy by confidence, the probability of the predicted class, in bins of equal width.

    `probabilities` is float (n, classes) with rows that sum to 1, `labels` is integer (n,). Returns
    float64 (bins,): examples per bin, their mean confidence and their accuracy, both 0 in an empty
    bin. A confidence on the edge between two bins belongs to the lower one. Raises `ValueError` for
    other arguments.
    """
    _check_shapes("probabilities (n, classes)", 2, probabilities, labels)
    probabilities = probabilities.cpu().double()
    labels = labels.cpu()
    last = probabilities.shape[1] - 1
    if not _all_within(probabilities, 0, 1):
        raise ValueError("probabilities contain NaN or a value outside 0..1")
    errors = probabilities.sum(1) - 1
    if not _all_within(errors, -1e-3, 1e-3):
        raise ValueError("a row of probabilities does not sum to 1")
    if labels.is_floating_point() or not _all_within(labels, 0, last):
        raise ValueError(f"labels must be integers in 0..{last}")
    confidence, predictions = probabilities.max(1)
    correct = (predictions == labels).double()
    # linspace may differ from i / bins by rounding.
    inner_edges = torch.arange(1, bins).double() / bins
    index = torch.bucketize(confidence, inner_edges)
    counts = torch.bincount(index, minlength=bins).double()
    total_confidence = torch.bincount(index, confidence, minlength=bins)
    total_correct = torch.bincount(index, correct, minlength=bins)
    divisor = counts.clamp(min=1)
    return counts, total_confidence / divisor, total_correct / divisor


def matthews_corrcoef_interval(confusion: ConfusionMatrix, resamples: int = 1000) -> Interval:
    """95% bootstrap percentile interval (low, high) of the Matthews correlation.

    Each resample draws as many examples as were counted, with replacement: its counts are
    multinomial. The same counts give the same interval. Efron and Tibshirani, "An introduction to
    the bootstrap", 1993, chapter 13.
    """
    counts = confusion.counts.cpu()
    labels, predictions = counts.nonzero(as_tuple=True)
    counts = counts[labels, predictions]
    statistic = ConfusionMatrix.matthews_corrcoef
    return _percentiles(_resample(statistic, counts, labels, predictions, resamples))


class _Totals(ConfusionMatrix):
    """A confusion matrix of which only the totals are known."""

    def __init__(self, totals: Tensor):
        self.totals = totals

    def _totals(self) -> Tensor:
        return self.totals


def _resample(
    statistic: Callable[[ConfusionMatrix], float],
    counts: Tensor,
    labels: Tensor,
    predictions: Tensor,
    resamples: int,
) -> Tensor:
    """The statistic, float64 (resamples,), of multinomial draws of as many examples as there are.

    The draws are the same in each call. `counts`, `labels` and `predictions` are int64 (cells,).
    The number in a cell, given those before it, is binomial. Memory does not grow with the number
    of cells.
    """
    classes = int(torch.cat([labels, predictions]).max()) + 1
    totals = torch.zeros(3, classes, resamples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    examples_left = counts.sum().double()
    draws_left = examples_left.repeat(resamples)
    for count, label, prediction in zip(counts, labels, predictions):
        drawn = torch.binomial(draws_left, count / examples_left, generator=generator)
        draws_left -= drawn
        examples_left -= count
        totals[0, label] += drawn * (label == prediction)
        totals[1, label] += drawn
        totals[2, prediction] += drawn
    figures = [statistic(_Totals(resample)) for resample in totals.permute(2, 0, 1)]
    return torch.tensor(figures, dtype=torch.float64)


def _percentiles(values: Tensor) -> Interval:
    """The ends of the central 95% of float64 (resamples,)."""
    return float(values.quantile(0.025)), float(values.quantile(0.975))


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    statistic: Callable[[Tensor], Tensor | float] = torch.mean,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Bootstrap percentile interval of statistic(a) - statistic(b), for two models.

    `a` and `b` are float (examples,) or (examples, columns), for example losses. They have a row
    per example in the same order, and each resample draws the same rows from both. `statistic`
    takes such a tensor of resampled rows, in float64. Returns (low, high) in the statistic's unit;
    the same seed gives the same interval. Raises `ValueError` if the shapes differ or there is no
    example. Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapters 8 and 13.
    """
    if a.shape != b.shape or not a.numel():
        raise ValueError(
            f"expected two tensors (examples,) or (examples, columns), got {a.shape} and {b.shape}"
        )
    generator = torch.Generator().manual_seed(seed)
    a = a.double()
    b = b.double()
    examples = len(a)
    differences = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        rows = torch.randint(examples, (examples,), generator=generator)
        differences[i] = statistic(a[rows]) - statistic(b[rows])
    return _percentiles(differences)


def paired_bootstrap_counts(
    predictions: tuple[Tensor, Tensor],
    labels: Tensor,
    statistic: Callable[[ConfusionMatrix], float],
    resamples: int = 1000,
) -> Interval:
    """`paired_bootstrap` of a metric of counts, such as `ConfusionMatrix.matthews_corrcoef`.

    `predictions` of the two models and `labels` are int64 (examples,), with at least one example.
    `statistic` may only call the confusion matrix's metrics.
    Resampling examples is the same as drawing the counts of the distinct (label, prediction,
    prediction) triples from a multinomial distribution, whose cost does not grow with the number of
    examples. Raises `ValueError` if the shapes differ or a class is negative.
    """
    columns = [labels, *predictions]
    if not all(column.shape == labels.shape and column.min() >= 0 for column in columns):
        raise ValueError("expected labels (n,) and two predictions (n,) with classes from 0")
    examples = torch.stack(columns).cpu()
    triples, counts = examples.unique(dim=1, return_counts=True)
    labels, *models = triples
    a, b = (_resample(statistic, counts, labels, model, resamples) for model in models)
    return _percentiles(a - b)


class McNemar(NamedTuple):
    """How often only one of two classifiers is right, and the p-value of `mcnemar_exact`."""

    only_a: int  # examples that only the first classifier gets right
    only_b: int
    p_value: float


def mcnemar_exact(correct_a: Tensor, correct_b: Tensor) -> McNemar:
    """McNemar's exact test, two-sided: do two classifiers have the same accuracy?

    `correct_a` and `correct_b` are bool (examples,), for the same examples. If the accuracies are
    equal, an example that only one classifier gets right is equally likely to be either's: only_a
    is Binomial(only_a + only_b, 1/2). The p-value is 1 if there is no such example. Raises
    `ValueError` if shapes or dtypes are wrong. McNemar, "Note on the sampling error of the
    difference between correlated proportions or percentages", 1947, with the binomial distribution
    in place of the chi-squared one.
    """
    if correct_a.shape != correct_b.shape or not correct_a.dtype == correct_b.dtype == torch.bool:
        raise ValueError("expected two bool tensors of the same shape")
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    differing = only_a + only_b
    # Python's integers are exact and don't overflow.
    binomial_coefficient = 1
    tail = 0
    for k in range(min(only_a, only_b) + 1):
        tail += binomial_coefficient
        binomial_coefficient = binomial_coefficient * (differing - k) // (k + 1)
    p_value = 2 * tail / 2**differing
    return McNemar(only_a, only_b, min(1.0, p_value))


def mean_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of two or more independent values, by Student's t."""
    density = torch.distributions.StudentT(torch.tensor(len(values) - 1).double())
    t = torch.linspace(0, 13, 130_001, dtype=torch.float64)  # the quantile of two values is 12.7
    share = torch.cumulative_trapezoid(density.log_prob(t).exp(), t)  # of the values in 0 .. t
    quantile = float(t[torch.searchsorted(share, 0.95 / 2)])
    margin = quantile * stdev(values) / math.sqrt(len(values))
    return fmean(values) - margin, fmean(values) + margin


def permutation_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the difference of two means, for example of the accuracy over seeds.

    The p-value is the share of all ways to split the pooled values into groups of these sizes whose
    means differ at least as much. If there are more than `MAX_SPLITS` ways, that many random ones
    are tried, the same in each call. Raises `ValueError` if a group is empty. Fisher, "The design
    of experiments", 1935, section 21.
    """
    if not a or not b:
        raise ValueError("each group needs a value")
    pooled = torch.tensor([*a, *b], dtype=torch.float64)
    size = len(a)
    if math.comb(len(pooled), size) <= MAX_SPLITS:
        combinations = itertools.combinations(range(len(pooled)), size)
        groups = torch.tensor(list(combinations))
    else:
        generator = torch.Generator().manual_seed(0)
        sort_keys = torch.rand(MAX_SPLITS, len(pooled), generator=generator)
        random_groups = sort_keys.argsort(1)[:, :size]
        groups = torch.cat([torch.arange(size)[None], random_groups])
    # The first group is `a`. The distance of a group's mean from the mean of all is proportional to
    # the difference of the two means.
    distances = (pooled[groups].mean(1) - pooled.mean()).abs()
    rounding = 1e-12 * pooled.abs().max()
    extreme = distances >= distances[0] - rounding
    return float(extreme.double().mean())


def holm(p_values: Sequence[float], comparisons: int) -> list[float]:
    """Adjusted p-values: the chance of any false rejection among `comparisons` is at most alpha.

    Tests of which only the p-values of some are given count as if the others' were 1. Holm, "A
    simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted = {}
    largest = 0.0
    for rank, p in enumerate(sorted(p_values)):
        largest = max(largest, (comparisons - rank) * p)
        adjusted[p] = min(1.0, largest)
    return [adjusted[p] for p in p_values]
