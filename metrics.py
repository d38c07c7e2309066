"""Classification metrics and statistical tests, computed from their definitions.

Values that are not defined, such as the precision of a class that is never predicted, are
scikit-learn's defaults.
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
PER_CLASS = [  # the columns of `ConfusionMatrix.per_class`
    "class",
    "precision",
    "recall",
    "f1",
    "examples",
]
MAX_SPLITS = 20_000  # that a permutation test tries


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, kept on `device` in O(num_classes²) memory.

    `counts` is int64 (num_classes, num_classes): rows are labels, columns predictions. `a + b` is a
    new matrix with the counts of both, for example of two parts of a data set. The metrics are
    computed on the CPU, and raise `ValueError` if no examples have been counted.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: two int64 tensors of the same shape, on this matrix's device.

        Raises `ValueError` if shapes or dtypes are wrong, or if a value is outside
        0..num_classes - 1. That check synchronizes with an accelerator.
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
        for name, values in (("labels", labels), ("predictions", predictions)):
            if not _all_within(values, 0, last):
                raise ValueError(f"{name} contain a value outside 0..{last}")
        one = self.counts.new_ones(())
        self.counts.index_put_((labels, predictions), one, accumulate=True)

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        merged = ConfusionMatrix(self.num_classes)
        merged.counts = self.counts + other.counts.to(self.counts.device)
        return merged

    def _totals(self) -> Tensor:
        """The numbers of hits, labels and predictions by class: float64 (3, num_classes), CPU."""
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
        """Average numerator / denominator, float64 (num_classes,), over the classes; 0 / 0 is 0.

        "macro": mean over the classes that occur in labels or predictions. "weighted": mean
        weighted by the number of labels per class. "micro": sum of numerators / sum of
        denominators. None: the values per class. Raises `ValueError` for anything else.
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
        """A row of the columns `PER_CLASS` for each class."""
        columns = [
            self.precision(None),
            self.recall(None),
            self.f1(None),
            self.counts.sum(1),
        ]
        return list(zip(class_names, *(column.tolist() for column in columns)))

    def matthews_corrcoef(self) -> float:
        """Correlation of labels and predictions, in -1..1; 0 if either has only one class.

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


class Evaluation(NamedTuple):
    """A model's predictions on a data split, on the CPU, and their metrics."""

    labels: Tensor  # int64 (examples,)
    predictions: Tensor  # int64 (examples,)
    logits: Tensor  # float32 (examples, classes)
    probabilities: Tensor  # float64 (examples, classes)
    losses: Tensor  # float64 (examples,): cross-entropy in nats
    confusion: ConfusionMatrix
    metrics: dict[str, float]  # by the names in EVALUATION_METRICS
    positive: int  # the positive class, if there are two

    def named(self, prefix: str, class_names: Sequence[str] = ()) -> dict[str, float]:
        """The metrics with prefixed names: "valid/loss", "valid/acc", ... for "valid".

        With `class_names`, also the share of the most frequent class, "valid/majority_share", and
        the figures of each class, "valid/precision/cat", ...
        """
        named = {f"{prefix}/{name}": value for name, value in self.metrics.items()}
        if class_names:
            named[f"{prefix}/majority_share"] = self.confusion.majority_share()
            for class_name, *values in self.confusion.per_class(class_names):
                for column, value in zip(PER_CLASS[1:], values):
                    named[f"{prefix}/{column}/{class_name}"] = value
        return named

    def one_against_rest(self, label: int) -> tuple[Tensor, Tensor]:
        """Scores and labels, as for `roc_curve`, of the class `label` against all others."""
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


COUNT_METRICS = {  # computed from a `ConfusionMatrix`
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
EVALUATION_METRICS = {  # apart from `COUNT_METRICS`, computed from an `Evaluation`
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

    The result has the metrics in `names` that are defined for these labels; if a loss is not
    finite, it has the mean loss only. `positive` is the positive class if there are two. Computed
    in float64, so that metrics recomputed from the probabilities agree. Raises `ValueError` if a
    name is unknown, or if shapes, dtypes or the range of the labels are wrong.
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
    both_occur = len(labels.unique()) == confusion.num_classes == 2
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
    thresholds`. The curve starts at (0, 0) with an infinite threshold. Tied scores share a point. A
    point halfway between its neighbors is dropped. A rate is NaN if its class does not occur.
    Raises `ValueError` if shapes or labels are wrong or a score is not finite. Fawcett, "An
    introduction to ROC analysis", 2006, algorithm 1.
    """
    thresholds, counts = _cumulative_counts(scores, labels)
    kept = torch.ones_like(thresholds, dtype=torch.bool)
    kept[1:-1] = counts.diff(n=2).any(0)  # the steps before and after differ
    true_positives, false_positives = F.pad(counts[:, kept], (1, 0))
    fpr = false_positives / false_positives[-1]
    tpr = true_positives / true_positives[-1]
    thresholds = F.pad(thresholds[kept], (1, 0), value=torch.inf)
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
    """Distinct scores in falling order, and how many positives and negatives reach each of them.

    Both are float64 on the CPU, (scores,) and (2, scores). Arguments and errors as in `roc_curve`.
    """
    _check_shapes("scores (n,)", 1, scores, labels)
    scores = scores.cpu().double()
    labels = labels.cpu()
    if not scores.isfinite().all():
        raise ValueError("scores contain NaN or infinity")
    if not set(labels.unique().tolist()) <= {0, 1}:
        raise ValueError("labels must be 0 or 1")
    thresholds, indices, examples = scores.unique(return_inverse=True, return_counts=True)
    positives = torch.bincount(indices, labels.double())
    counts = torch.stack([positives, examples - positives])
    return thresholds.flip(0), counts.flip(1).cumsum(1)


def _check_shapes(
    expected: str,
    dimensions: int,
    values: Tensor,
    labels: Tensor,
) -> None:
    """Raise `ValueError` unless `values` has this number of dimensions and a row per label."""
    if values.ndim != dimensions or labels.shape != values.shape[:1] or not len(labels):
        raise ValueError(
            f"expected {expected} and labels (n,) with n > 0, "
            f"got {tuple(values.shape)} and {tuple(labels.shape)}"
        )


def _all_within(values: Tensor, low: float, high: float) -> bool:
    """Whether all values are in low..high; NaN is not."""
    return torch.equal(values, values.clamp(low, high))


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
    bin. A confidence on the edge between two bins belongs to the lower one. Raises `ValueError` if
    shapes or values are wrong.
    """
    _check_shapes("probabilities (n, classes)", 2, probabilities, labels)
    probabilities = probabilities.cpu().double()
    labels = labels.cpu()
    if not _all_within(probabilities, 0, 1):
        raise ValueError("probabilities contain NaN or a value outside 0..1")
    if not _all_within(probabilities.sum(1), 0.999, 1.001):
        raise ValueError("a row of probabilities does not sum to 1")
    last = probabilities.shape[1] - 1
    if labels.is_floating_point() or not _all_within(labels, 0, last):
        raise ValueError(f"labels must be integers in 0..{last}")
    confidence, predictions = probabilities.max(1)
    correct = (predictions == labels).double()
    # linspace may differ from i / bins by rounding.
    inner_edges = torch.arange(1, bins).double() / bins
    indices = torch.bucketize(confidence, inner_edges)
    counts = torch.bincount(indices, minlength=bins).double()
    total_confidence = torch.bincount(indices, confidence, minlength=bins)
    total_correct = torch.bincount(indices, correct, minlength=bins)
    divisor = counts.clamp(min=1)
    return counts, total_confidence / divisor, total_correct / divisor


def matthews_corrcoef_interval(confusion: ConfusionMatrix, resamples: int = 1000) -> Interval:
    """95% bootstrap percentile interval (low, high) of the Matthews correlation.

    The same counts give the same interval. Efron and Tibshirani, "An introduction to the
    bootstrap", 1993, chapter 13.
    """
    matrix = confusion.counts.cpu()
    labels, predictions = matrix.nonzero(as_tuple=True)
    counts = matrix[labels, predictions]
    return _percentiles(
        _resample(ConfusionMatrix.matthews_corrcoef, counts, labels, predictions, resamples)
    )


class _Resample(ConfusionMatrix):
    """A confusion matrix with totals but without counts."""

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
    """The statistic of bootstrap resamples of counted examples, float64 (resamples,).

    `counts[i]` examples have the label `labels[i]` and the prediction `predictions[i]`. A resample
    draws as many examples with replacement, so its counts are multinomial: each is binomial, given
    those before it. The draws depend on `counts` only. Memory does not grow with its length.
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
    values = [statistic(_Resample(resample)) for resample in totals.permute(2, 0, 1)]
    return torch.tensor(values, dtype=torch.float64)


def _percentiles(values: Tensor) -> Interval:
    """The interval that holds the central 95% of the values."""
    return float(values.quantile(0.025)), float(values.quantile(0.975))


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    statistic: Callable[[Tensor], Tensor | float] = torch.mean,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95% bootstrap percentile interval of statistic(a) - statistic(b), for two models.

    `a` and `b` are float (examples,) or (examples, columns), for example losses. They have a row
    per example in the same order, and each resample draws the same rows from both. `statistic`
    takes such a tensor of resampled rows, in float64. The same seed gives the same interval. Raises
    `ValueError` if the shapes differ or there is no example. Efron and Tibshirani, "An introduction
    to the bootstrap", 1993, chapters 8 and 13.
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
    `statistic` may use the confusion matrix's metrics, but not its counts. The counts of distinct
    triples (label, prediction, prediction) are resampled, which takes no longer for more examples.
    Raises `ValueError` if the shapes differ or a class is negative.
    """
    columns = [labels, *predictions]
    if not all(column.shape == labels.shape and column.min() >= 0 for column in columns):
        raise ValueError("expected labels (n,) and two predictions (n,) with classes from 0")
    triples, counts = torch.stack(columns).cpu().unique(dim=1, return_counts=True)
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
    equal, an example that only one classifier gets right is as likely to be the first's as the
    second's: only_a is Binomial(only_a + only_b, 1/2). The p-value is 1 if there is no such
    example. Raises `ValueError` if shapes or dtypes are wrong. McNemar, "Note on the sampling error
    of the difference between correlated proportions or percentages", 1947, with the binomial
    distribution in place of the chi-squared one.
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
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**differing))


def mean_interval(values: Sequence[float]) -> Interval:
    """95% confidence interval of the mean of two or more independent values, by Student's t."""
    student = torch.distributions.StudentT(torch.tensor(len(values) - 1).double())
    t = torch.linspace(0, 13, 130_001, dtype=torch.float64)  # the quantile of two values is 12.7
    probability = torch.cumulative_trapezoid(student.log_prob(t).exp(), t)  # of 0..t
    quantile = float(t[torch.searchsorted(probability, 0.95 / 2)])
    mean = fmean(values)
    margin = quantile * stdev(values) / math.sqrt(len(values))
    return mean - margin, mean + margin


def permutation_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the difference of two means, for example of the accuracy over seeds.

    Of all ways to split the pooled values into groups of these sizes, it is the share with means
    that differ at least as much. If there are more than `MAX_SPLITS` ways, that many random ones
    are tried, the same in each call. Raises `ValueError` if a group is empty or a value is not
    finite. Fisher, "The design of experiments", 1935, section 21.
    """
    pooled = torch.tensor([*a, *b], dtype=torch.float64)
    if not a or not b or not pooled.isfinite().all():
        raise ValueError("each group needs a value, and all values must be finite")
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
    """Adjusted p-values of some of `comparisons` tests; the p-values not given count as 1.

    If those up to alpha are rejected, the chance of any false rejection is at most alpha. Holm, "A
    simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted = {}
    largest = 0.0
    for rank, p in enumerate(sorted(p_values)):
        largest = max(largest, (comparisons - rank) * p)
        adjusted[p] = min(1.0, largest)
    return [adjusted[p] for p in p_values]
