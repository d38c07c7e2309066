"""Classification metrics, computed from their definitions.

`ConfusionMatrix` accumulates batches on the device, and its methods compute metrics from the counts. The functions
take the scores of a binary classifier, or class probabilities. If a definition divides by zero or a class never
occurs, the result is scikit-learn's default.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, kept on `device` in O(num_classes²) memory.

    `update` takes a few small operations and never synchronizes with an accelerator. `+` merges the counts of two
    matrices over the same classes, for example from two parts of a data set.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes, self._last = num_classes, num_classes - 1
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._out_of_range = torch.zeros((), dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: two int64 tensors of the same shape, on this matrix's device.

        Raises `ValueError` if shapes or dtypes are wrong, or if a value is outside 0 .. num_classes - 1. On an
        accelerator, the range error is raised when a metric or `counts` is read.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in shape"
            )
        if not predictions.dtype == labels.dtype == torch.int64:
            raise ValueError(
                f"predictions and labels must be int64, got {predictions.dtype} and {labels.dtype}"
            )
        rows, columns = labels.clamp(0, self._last), predictions.clamp(0, self._last)
        if not self._counts.is_cpu:
            self._out_of_range += (rows != labels).sum() + (columns != predictions).sum()
        elif not (torch.equal(labels, rows) and torch.equal(predictions, columns)):
            name = "predictions" if torch.equal(labels, rows) else "labels"
            raise ValueError(f"{name} contain a value outside 0..{self._last}")
        # Not bincount: it synchronizes with an accelerator to find the largest value, and is half as fast on a CPU.
        self._counts.index_put_((rows, columns), self._one, accumulate=True)

    @property
    def counts(self) -> Tensor:
        """int64 (num_classes, num_classes) on the device; rows are labels, columns predictions."""
        if self._out_of_range:
            raise ValueError(f"labels or predictions contain a value outside 0..{self._last}")
        return self._counts.clone()

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        if self.num_classes != other.num_classes:
            raise ValueError(
                f"can't add matrices with {self.num_classes} and {other.num_classes} classes"
            )
        merged = ConfusionMatrix(self.num_classes, self._counts.device)
        merged._counts += self._counts + other._counts.to(self._counts.device)
        merged._out_of_range += self._out_of_range + other._out_of_range.to(self._counts.device)
        return merged

    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The matrix, its diagonal, examples per label and examples per prediction; float64 on the CPU."""
        counts = self.counts.cpu().double()
        if not counts.any():
            raise ValueError("no examples have been counted")
        return counts, counts.diagonal(), counts.sum(1), counts.sum(0)

    def accuracy(self) -> float:
        """The share of correct predictions."""
        counts, hits, _, _ = self._read()
        return float(hits.sum() / counts.sum())

    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that occur in the labels."""
        _, hits, labelled, _ = self._read()
        occur = labelled > 0
        return float((hits[occur] / labelled[occur]).mean())

    def majority_share(self) -> float:
        """The share of the most frequent label: the accuracy of always predicting it."""
        counts, _, labelled, _ = self._read()
        return float(labelled.max() / counts.sum())

    def precision(self, average: str | None) -> "float | Tensor":
        """TP / (TP + FP). `average` is "macro", "micro", "weighted" or None, as in `_average`."""
        _, hits, _, predicted = self._read()
        return self._average(hits, predicted, average)

    def recall(self, average: str | None) -> "float | Tensor":
        """TP / (TP + FN). `average` as in `precision`."""
        _, hits, labelled, _ = self._read()
        return self._average(hits, labelled, average)

    def f1(self, average: str | None) -> "float | Tensor":
        """The harmonic mean of precision and recall, 2·TP / (2·TP + FP + FN). `average` as in `precision`."""
        _, hits, labelled, predicted = self._read()
        return self._average(2 * hits, labelled + predicted, average)

    def _average(
        self, numerator: Tensor, denominator: Tensor, average: str | None
    ) -> "float | Tensor":
        """Average numerator / denominator over the classes; a class whose denominator is 0 counts as 0.

        "macro": unweighted mean over the classes that occur in labels or predictions. "weighted": mean weighted by
        the number of labels per class. "micro": sum of numerators / sum of denominators. None: no average, float64
        (num_classes,). Raises `ValueError` for anything else.
        """
        _, _, labelled, predicted = self._read()
        per_class = torch.where(denominator > 0, numerator / denominator.clamp(min=1), 0.0)
        if average is None:
            return per_class
        if average == "macro":
            return float(per_class[labelled + predicted > 0].mean())
        if average == "weighted":
            return float((per_class * labelled).sum() / labelled.sum())
        if average == "micro":
            return float(numerator.sum() / denominator.sum())
        raise ValueError(f'average must be "macro", "micro", "weighted" or None, got {average!r}')

    def matthews_corrcoef(self) -> float:
        """Correlation of labels and predictions, in -1 .. 1; 0 if either has only one class.

        The multi-class form R_K of Gorodkin, "Comparing two K-category assignments by a K-category
        correlation coefficient", 2004, eq. 8.
        """
        _, hits, labelled, predicted = self._read()
        return float(_matthews_corrcoef(hits.sum(), labelled, predicted))

    def cohen_kappa(self) -> float:
        """Agreement of labels and predictions beyond chance; NaN if both consist of the same single class.

        Cohen, "A coefficient of agreement for nominal scales", 1960.
        """
        counts, hits, labelled, predicted = self._read()
        total = counts.sum()
        by_chance = labelled @ predicted / total
        return float((hits.sum() - by_chance) / (total - by_chance))


class Evaluation(NamedTuple):
    """A model's predictions on a data split, on the CPU, and their metrics."""

    labels: Tensor  # int64 (examples,)
    predictions: Tensor  # int64 (examples,)
    logits: Tensor  # float32 (examples, classes)
    probabilities: Tensor  # float64 (examples, classes)
    losses: Tensor  # float64 (examples,): cross-entropy in nats
    confusion: ConfusionMatrix
    metrics: dict[
        str, float
    ]  # by name: those of EVALUATION_METRICS that are defined for these labels

    def named(self, prefix: str) -> dict[str, float]:
        """The metrics with prefixed names: "valid/loss", "valid/acc", ... for "valid"."""
        return {f"{prefix}/{name}": value for name, value in self.metrics.items()}

    def columns(self) -> dict[str, list[Any]]:
        """Columns of a table with a row per example, in order: label and prediction as indices, probabilities, loss."""
        probabilities = {f"probability_{c}": p.tolist() for c, p in enumerate(self.probabilities.T)}
        classes = {"label": self.labels.tolist(), "prediction": self.predictions.tolist()}
        return {**classes, **probabilities, "loss": self.losses.tolist()}


class Metric(NamedTuple):
    """A figure that is computed whenever a model is evaluated."""

    compute: Callable[
        [Any], float
    ]  # of a `ConfusionMatrix` if `of_counts`, else of an `Evaluation`
    of_counts: bool = True
    lower_is_better: bool = False
    two_classes: bool = False  # defined only if there are two classes, and both occur in the labels


# The only place that names these figures: what stands here is logged, saved, compared, and can be monitored.
EVALUATION_METRICS = {
    "loss": Metric(
        lambda result: float(result.losses.mean()), of_counts=False, lower_is_better=True
    ),
    "acc": Metric(ConfusionMatrix.accuracy),
    "balanced_acc": Metric(ConfusionMatrix.balanced_accuracy),
    "precision_macro": Metric(lambda confusion: confusion.precision("macro")),
    "recall_macro": Metric(lambda confusion: confusion.recall("macro")),
    "f1_macro": Metric(lambda confusion: confusion.f1("macro")),
    "precision_micro": Metric(lambda confusion: confusion.precision("micro")),
    "recall_micro": Metric(lambda confusion: confusion.recall("micro")),
    "f1_micro": Metric(lambda confusion: confusion.f1("micro")),
    "mcc": Metric(ConfusionMatrix.matthews_corrcoef),
    "ece": Metric(
        lambda r: expected_calibration_error(r.probabilities, r.labels), False, lower_is_better=True
    ),
    "roc_auc": Metric(lambda r: roc_auc(r.probabilities[:, 1], r.labels), False, two_classes=True),
    "average_precision": Metric(
        lambda r: average_precision(r.probabilities[:, 1], r.labels), False, two_classes=True
    ),
}


def lower_is_better(name: str) -> bool:
    """Whether lower is better for a metric ("ece") or a key ("valid/ece"); for others, whether they end in loss."""
    name = name.rpartition("/")[2]
    return (
        EVALUATION_METRICS[name].lower_is_better
        if name in EVALUATION_METRICS
        else name.endswith("loss")
    )


def evaluation(logits: Tensor, labels: Tensor) -> Evaluation:
    """`Evaluation` of logits, float (examples, classes), against labels, int64 (examples,).

    Computed in float64, so that metrics recomputed from the probabilities agree. Raises `ValueError` if shapes,
    dtypes or the range of the labels are wrong.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (examples, classes), got {tuple(logits.shape)}")
    logits, labels = logits.float().cpu(), labels.cpu()
    confusion = ConfusionMatrix(logits.shape[1])
    predictions = logits.argmax(1)
    confusion.update(predictions, labels)
    log_probabilities = logits.double().log_softmax(1)
    losses = F.nll_loss(log_probabilities, labels, reduction="none")
    result = Evaluation(
        labels, predictions, logits, log_probabilities.exp(), losses, confusion, metrics={}
    )
    if not losses.isfinite().all():  # the model has diverged: nothing else is defined
        result.metrics["loss"] = float(losses.mean())
        return result
    both_occur = confusion.num_classes == 2 and len(labels.unique()) == 2
    for name, metric in EVALUATION_METRICS.items():
        if both_occur or not metric.two_classes:
            result.metrics[name] = metric.compute(confusion if metric.of_counts else result)
    return result


def matthews_corrcoef_interval(
    confusion: ConfusionMatrix, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval (low, high) of the Matthews correlation; the same seed gives the same interval.

    Each of the `resamples` draws as many examples as were counted, with replacement: its counts are multinomial. Efron
    and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.
    """
    counts = confusion.counts.cpu()
    classes = torch.zeros(
        2, confusion.num_classes, resamples, dtype=torch.float64
    )  # examples per label, prediction
    hits = torch.zeros(resamples, dtype=torch.float64)
    labels, predictions = counts.nonzero(as_tuple=True)
    for label, prediction, drawn in zip(
        labels, predictions, _resample(counts[labels, predictions], resamples, seed)
    ):
        classes[0, label] += drawn
        classes[1, prediction] += drawn
        hits += drawn * (label == prediction)
    return _percentiles(_matthews_corrcoef(hits, *classes), confidence)


def _matthews_corrcoef(hits: Tensor, labelled: Tensor, predicted: Tensor) -> Tensor:
    """From correct predictions (...), examples per label and per prediction (classes, ...): float64 (...)."""
    total = labelled.sum(0)
    covariance = hits * total - (labelled * predicted).sum(0)
    spread = (total**2 - (labelled**2).sum(0)) * (total**2 - (predicted**2).sum(0))
    return torch.where(spread > 0, covariance / spread.clamp(min=1).sqrt(), 0.0)


def _resample(counts: Tensor, resamples: int, seed: int) -> Iterator[Tensor]:
    """Multinomial draws of as many examples as `counts`, int64 (cells,), has: float64 (resamples,) for each cell.

    The number in a cell, given those before it, is binomial.
    """
    generator = torch.Generator().manual_seed(seed)
    remaining = counts.flip(0).cumsum(0).flip(0).double()
    left = remaining[0].repeat(resamples)
    for share in counts.double() / remaining:
        drawn = torch.binomial(left, share.expand(resamples), generator=generator)
        left = left - drawn
        yield drawn


def _percentiles(values: Tensor, confidence: float) -> tuple[float, float]:
    """Low and high end of the central `confidence` of float64 (resamples,)."""
    tail = (1 - confidence) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def roc_curve(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positive rates of the classifier "score >= threshold", for decreasing thresholds.

    `scores` is float (n,), `labels` is integer (n,) of 0 and 1. Returns float64 `fpr, tpr, thresholds`. The curve
    starts at (0, 0) with an infinite threshold; tied scores share a point; points in the middle of a straight line of
    equal steps are dropped. A rate is NaN if its class does not occur. Raises `ValueError` if shapes or labels are
    wrong or a score is not finite. Fawcett, "An introduction to ROC analysis", 2006, algorithm 1.
    """
    thresholds, true_positives, false_positives = _cumulative_counts(scores, labels)
    if len(thresholds) > 2:
        bends = (true_positives.diff(n=2) != 0) | (false_positives.diff(n=2) != 0)
        keep = torch.cat([torch.tensor([True]), bends, torch.tensor([True])])
        thresholds, true_positives, false_positives = (
            thresholds[keep],
            true_positives[keep],
            false_positives[keep],
        )
    start = torch.zeros(1, dtype=torch.float64)
    false_positives = torch.cat([start, false_positives])
    true_positives = torch.cat([start, true_positives])
    thresholds = torch.cat([start + torch.inf, thresholds])
    return false_positives / false_positives[-1], true_positives / true_positives[-1], thresholds


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve by the trapezoidal rule; NaN if only one class occurs. Arguments as in `roc_curve`."""
    fpr, tpr, _ = roc_curve(scores, labels)
    return float(torch.trapezoid(tpr, fpr))


def precision_recall_curve(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision and recall of the classifier "score >= threshold", for increasing thresholds.

    Arguments and errors as in `roc_curve`. Returns float64 `precision, recall, thresholds`; the first two have one
    more element, the point (1, 0), which has no threshold. Recall is 1 throughout if there is no positive label.
    """
    thresholds, true_positives, false_positives = _cumulative_counts(scores, labels)
    precision = true_positives / (true_positives + false_positives)
    positives = true_positives[-1]
    recall = true_positives / positives if positives > 0 else torch.ones_like(true_positives)
    end = torch.zeros(1, dtype=torch.float64)
    return (
        torch.cat([precision.flip(0), end + 1]),
        torch.cat([recall.flip(0), end]),
        thresholds.flip(0),
    )


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Sum over thresholds of precision × increase in recall, without interpolation; 0 if there is no positive label.

    Arguments and errors as in `roc_curve`.
    """
    precision, recall, _ = precision_recall_curve(scores, labels)
    return float(-(recall.diff() * precision[:-1]).sum())


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over the bins of `calibration`, weighted by examples per bin.

    Guo et al., "On calibration of modern neural networks", 2017, eq. 3.
    """
    counts, confidences, accuracies = calibration(probabilities, labels, bins)
    return float((counts * (accuracies - confidences)).abs().sum() / counts.sum())


def calibration(
    probabilities: Tensor, labels: Tensor, bins: int = 15
) -> tuple[Tensor, Tensor, Tensor]:
    """How often a model is right, by how sure it is: equal-width bins of the top probability.

    `probabilities` is float (n, classes) with rows that sum to 1, `labels` is integer (n,). Returns float64 (bins,):
    examples per bin, their mean confidence and their accuracy, both 0 in an empty bin. A confidence on the edge between
    two bins belongs to the lower one. Raises `ValueError` for other arguments.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            "expected probabilities (n, classes) and labels (n,) with n > 0, "
            f"got {tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    probabilities, labels = probabilities.detach().cpu().double(), labels.detach().cpu()
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities contain NaN or a value outside 0..1")
    if ((probabilities.sum(1) - 1).abs() > 1e-3).any():
        raise ValueError("a row of probabilities does not sum to 1")
    if labels.is_floating_point() or (labels < 0).any() or (labels >= probabilities.shape[1]).any():
        raise ValueError(f"labels must be integers in 0..{probabilities.shape[1] - 1}")
    confidence, predictions = probabilities.max(1)
    edges = (
        torch.arange(bins + 1, dtype=torch.float64) / bins
    )  # linspace may differ from i / bins by rounding
    which = torch.bucketize(confidence, edges[1:-1])
    counts, confidences, hits = (
        torch.bincount(which, weights, minlength=bins)
        for weights in (torch.ones_like(confidence), confidence, (predictions == labels).double())
    )
    return counts, confidences / counts.clamp(min=1), hits / counts.clamp(min=1)


def _cumulative_counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct scores in decreasing order, and the positives and negatives that score at least that; float64, CPU."""
    if scores.ndim != 1 or scores.shape != labels.shape or not len(scores):
        raise ValueError(
            f"expected scores (n,) and labels (n,) with n > 0, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    scores, labels = scores.detach().cpu().double(), labels.detach().cpu()
    if not scores.isfinite().all():
        raise ValueError("scores contain NaN or infinity")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1")
    scores, order = scores.sort(descending=True, stable=True)
    positives = labels[order].double().cumsum(0)
    last_of_tie = torch.cat([scores.diff() != 0, torch.tensor([True])])
    seen = torch.arange(1, len(scores) + 1, dtype=torch.float64)[last_of_tie]
    return scores[last_of_tie], positives[last_of_tie], seen - positives[last_of_tie]


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    statistic: Callable[[Tensor], float] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap percentile interval (low, high) of statistic(a) - statistic(b) for two models on the same examples.

    `a` and `b` are float (examples,) or (examples, columns), a row per example in the same order; each resample draws
    the same rows from both. `statistic` takes such a tensor of resampled rows; None is the mean, for example of the
    losses. The result has the statistic's unit, and the same seed gives the same interval. Raises `ValueError` if the
    shapes differ or there is no example. Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapters 8
    and 13.
    """
    if a.shape != b.shape or not a.ndim or not len(a) or (statistic is None and a.ndim > 1):
        raise ValueError(
            f"expected two tensors (examples,) or (examples, columns), got {a.shape} and {b.shape}"
        )
    generator = torch.Generator().manual_seed(seed)
    a, b = a.cpu().double(), b.cpu().double()
    differences = []
    for part in torch.arange(resamples).split(max(1, 1_000_000 // len(a))):  # limits the memory
        rows = torch.randint(len(a), (len(part), len(a)), generator=generator)
        if statistic is None:
            differences += (a - b)[rows].mean(1).tolist()
        else:
            differences += [statistic(a[chosen]) - statistic(b[chosen]) for chosen in rows]
    return _percentiles(torch.tensor(differences, dtype=torch.float64), confidence)


def paired_bootstrap_counts(
    predictions: tuple[Tensor, Tensor],
    labels: Tensor,
    statistic: Callable[[ConfusionMatrix], float],
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """`paired_bootstrap` for a metric that depends on counts only, such as `ConfusionMatrix.matthews_corrcoef`.

    `predictions` of the two models and `labels` are int64 (examples,). Resampling examples is drawing the counts of
    the distinct (label, prediction, prediction) triples from a multinomial distribution, whose cost does not grow with
    the number of examples. Raises `ValueError` if the shapes differ, a class is negative or there is no example.
    """
    columns = [labels, *predictions]
    if (
        labels.ndim != 1
        or not len(labels)
        or any(c.shape != labels.shape or c.min() < 0 for c in columns)
    ):
        raise ValueError(
            "expected labels (n,) and two predictions (n,) with classes from 0 and n > 0"
        )
    triples, counts = torch.stack(columns).cpu().unique(dim=1, return_counts=True)
    (label, first, second), classes = triples, max(2, int(triples.max()) + 1)
    drawn = torch.stack(list(_resample(counts, resamples, seed)), 1).long()
    differences = torch.zeros(resamples, dtype=torch.float64)
    for predicted, sign in ((first, 1), (second, -1)):
        matrices = torch.zeros(resamples, classes * classes, dtype=torch.int64)
        matrices.index_add_(1, label * classes + predicted, drawn)
        resampled = ConfusionMatrix(classes)
        for i, counts in enumerate(matrices.view(-1, classes, classes)):
            resampled._counts = counts
            differences[i] += sign * statistic(resampled)
    return _percentiles(differences, confidence)


class McNemar(NamedTuple):
    """The examples on which two classifiers differ in being right, and the p-value of `mcnemar_exact`."""

    only_a: int  # examples that only the first classifier gets right
    only_b: int
    p_value: float


def mcnemar_exact(correct_a: Tensor, correct_b: Tensor) -> McNemar:
    """McNemar's exact test, two-sided: do two classifiers have the same accuracy on the same examples?

    `correct_a` and `correct_b` are bool (examples,). If they have, an example that only one of them gets right is as
    likely to be the one's as the other's: Binomial(only_a + only_b, 1/2). The p-value is 1 if there is none. Raises
    `ValueError` if shapes or dtypes are wrong. McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", 1947, with the binomial distribution in place of the chi-squared one.
    """
    if correct_a.shape != correct_b.shape or not correct_a.dtype == correct_b.dtype == torch.bool:
        raise ValueError("expected two bool tensors of the same shape")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    differing, term, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):  # in whole numbers: exact, and no overflow
        tail += term
        term = term * (differing - k) // (k + 1)
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**differing))


def permutation_test(
    a: Sequence[float], b: Sequence[float], resamples: int = 20_000, seed: int = 0
) -> float:
    """Two-sided p-value of the difference of two means, for example of the accuracy over the seeds of two settings.

    The share of all ways to split the pooled values into groups of these sizes whose means differ at least as much;
    if there are more than `resamples` ways, of so many random ones. Raises `ValueError` if a group is empty. Fisher,
    "The design of experiments", 1935, section 21.
    """
    if not a or not b:
        raise ValueError("each group needs a value")
    pooled, n = torch.tensor([*a, *b], dtype=torch.float64), len(a)
    exact = math.comb(len(pooled), n) <= resamples
    if exact:
        groups = torch.tensor(list(itertools.combinations(range(len(pooled)), n)))
    else:
        generator = torch.Generator().manual_seed(seed)
        groups = torch.rand(resamples, len(pooled), generator=generator).argsort(1)[:, :n]
    mean, scale = pooled.mean(), pooled.abs().max()
    distances = (pooled[groups].mean(1) - mean).abs()  # proportional to the difference of the means
    observed = (pooled[:n].mean() - mean).abs() - 1e-12 * scale  # equal but for rounding
    extreme = int((distances >= observed).sum())
    return extreme / len(groups) if exact else (extreme + 1) / (len(groups) + 1)
