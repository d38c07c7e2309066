"""metrics.py: known values, agreement with scikit-learn, and rejected arguments; also the progress meter."""

import math
import pickle

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as reference
import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
from harness import distributed
from harness.progress import Meter

AVERAGES = ("macro", "micro", "weighted", None)
pytestmark = pytest.mark.quick


def close(actual, expected, case: object = "") -> None:
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=1e-12, equal_nan=True, err_msg=str(case)
    )


def filled(counts: list[list[int]]) -> metrics.ConfusionMatrix:
    """A matrix updated with examples that give these counts."""
    cells = torch.cartesian_prod(*[torch.arange(len(counts))] * 2)
    labels, predictions = cells.repeat_interleave(torch.tensor(counts).flatten(), dim=0).T
    matrix = metrics.ConfusionMatrix(len(counts))
    matrix.update(predictions, labels)
    return matrix


def random_pairs(
    rng: np.random.Generator, classes: int = 5, examples: int = 100
) -> tuple[Tensor, Tensor]:
    """Random predictions and labels."""
    return tuple(torch.from_numpy(rng.integers(classes, size=(2, examples))))


KNOWN = {
    # Labels 4, 6; predictions 5, 5; 7 of 10 correct.
    "2 classes": (
        [[3, 1], [2, 4]],
        {
            "accuracy": 7 / 10,
            "balanced_accuracy": 17 / 24,  # (3/4 + 4/6) / 2
            "majority_share": 6 / 10,
            "precision": (
                7 / 10,
                7 / 10,
                18 / 25,
                [3 / 5, 4 / 5],
            ),  # weighted: (4 · 3/5 + 6 · 4/5) / 10
            "recall": (17 / 24, 7 / 10, 7 / 10, [3 / 4, 2 / 3]),
            "f1": (
                23 / 33,
                7 / 10,
                116 / 165,
                [2 / 3, 8 / 11],
            ),  # 6/(4+5), 8/(6+5); (4 · 2/3 + 6 · 8/11) / 10
            "matthews_corrcoef": 1 / math.sqrt(6),  # (3·4 - 1·2) / √(4·6·5·5)
            "cohen_kappa": 2 / 5,  # expected by chance (4·5 + 6·5) / 10 = 5; (7 - 5) / (10 - 5)
        },
    ),
    # Class 2 is predicted but never occurs: labels 8, 3, 0; predictions 6, 4, 1; 7 of 11 correct.
    "3 classes": (
        [[5, 2, 1], [1, 2, 0], [0, 0, 0]],
        {
            "accuracy": 7 / 11,
            "balanced_accuracy": 31 / 48,  # (5/8 + 2/3) / 2
            "majority_share": 8 / 11,
            "precision": (
                4 / 9,
                7 / 11,
                49 / 66,
                [5 / 6, 1 / 2, 0],
            ),  # weighted: (8 · 5/6 + 3 · 1/2) / 11
            "recall": (31 / 72, 7 / 11, 7 / 11, [5 / 8, 2 / 3, 0]),
            "f1": (
                3 / 7,
                7 / 11,
                52 / 77,
                [5 / 7, 4 / 7, 0],
            ),  # 10/(8+6), 4/(3+4); (8 · 5/7 + 3 · 4/7) / 11
            # (7·11 - (8·6 + 3·4)) / √((11² - 8² - 3²) · (11² - 6² - 4² - 1²))
            "matthews_corrcoef": 17 / math.sqrt(3264),
            "cohen_kappa": 17
            / 61,  # expected by chance (8·6 + 3·4) / 11 = 60/11; (77 - 60) / (121 - 60)
        },
    ),
}


@pytest.mark.parametrize(("counts", "expected"), KNOWN.values(), ids=KNOWN)
def test_known_confusion_matrix(counts, expected):
    matrix = filled(counts)
    assert matrix.counts.tolist() == counts
    for name, value in expected.items():
        if isinstance(value, tuple):
            for average, averaged in zip(AVERAGES, value):
                close(getattr(matrix, name)(average), averaged, (name, average))
        else:
            close(getattr(matrix, name)(), value, name)


# Sorted scores .9 | .7 .7 | .4 | .2, labels 1 | 1 0 | 1 | 0: true positives 1 2 3 3 of 3, false 0 1 1 2 of 2.
SCORES, LABELS = torch.tensor([0.4, 0.7, 0.9, 0.2, 0.7]), torch.tensor([1, 0, 1, 0, 1])


def test_known_roc_curve():
    fpr, tpr, thresholds = metrics.roc_curve(SCORES, LABELS)
    close(fpr, [0, 0, 1 / 2, 1 / 2, 1])
    close(tpr, [0, 1 / 3, 2 / 3, 1, 1])
    close(thresholds, [math.inf, *SCORES[[2, 1, 0, 3]]])
    # Of the 3 · 2 pairs of a positive and a negative, .9 wins 2, .7 wins 1 and ties 1, .4 wins 1.
    close(metrics.roc_auc(SCORES, LABELS), (2 + 1.5 + 1) / 6)


def test_roc_curve_drops_collinear_points():
    fpr, tpr, thresholds = metrics.roc_curve(
        torch.tensor([4, 3, 2, 1, 0]), torch.tensor([1, 0, 0, 0, 1])
    )
    close(thresholds, [math.inf, 4, 1, 0])
    close(fpr, [0, 0, 1, 1])
    close(tpr, [0, 1 / 2, 1 / 2, 1])


def test_known_precision_recall_curve():
    precision, recall, thresholds = metrics.precision_recall_curve(SCORES, LABELS)
    close(precision, [3 / 5, 3 / 4, 2 / 3, 1, 1])
    close(recall, [1, 1, 2 / 3, 1 / 3, 0])
    close(thresholds, SCORES[[3, 0, 1, 2]])
    # Recall rises in three steps of 1/3, at precision 1, 2/3 and 3/4.
    close(metrics.average_precision(SCORES, LABELS), 29 / 36)


def test_known_calibration_error():
    probabilities = torch.tensor(
        [[0.5, 0.25, 0.25], [0.75, 0.25, 0], [0.375, 0.3125, 0.3125], [0, 0, 1]]
    )
    # Correct, wrong, correct, correct. Lower bin, which includes a confidence of .5: .5 + .625; upper bin: -.75 + 0.
    close(
        metrics.expected_calibration_error(probabilities, torch.tensor([0, 1, 0, 2]), bins=2),
        (1.125 + 0.75) / 4,
    )


def test_known_calibration():
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.2, 0.8]])
    counts, confidences, accuracies = metrics.calibration(
        probabilities, torch.tensor([0, 0, 0, 1]), bins=4
    )
    # Bins end at 0.25, 0.5, 0.75 and 1; 0.5 belongs to the second.
    assert counts.tolist() == [0, 1, 1, 2]
    assert confidences.tolist() == pytest.approx([0, 0.5, 0.6, 0.85])
    assert accuracies.tolist() == [0, 1, 0, 1]


def test_calibration_error_has_15_bins():
    probabilities = torch.tensor(
        [[0.53, 0.47], [0.54, 0.46]], dtype=torch.float64
    )  # 8/15 = .533… is between them
    close(
        metrics.expected_calibration_error(probabilities, torch.tensor([0, 1])), (0.47 + 0.54) / 2
    )


PARTS = {  # the classes from which labels and predictions are drawn
    "all classes": lambda rng, classes: (classes, classes),
    "some classes": lambda rng, classes: (
        rng.choice(classes, rng.integers(1, len(classes) + 1)),
        rng.choice(classes, rng.integers(1, len(classes) + 1)),
    ),
    "one predicted": lambda rng, classes: (classes, rng.choice(classes, 1)),
    "one labelled": lambda rng, classes: (rng.choice(classes, 1), classes),
    "one of each": lambda rng, classes: (rng.choice(classes[:2], 1), rng.choice(classes[:2], 1)),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_random_labels_against_scikit_learn(parts):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        classes = np.arange(rng.integers(2, 21))
        size = rng.integers(1, 200)
        labels, predictions = (rng.choice(part, size) for part in parts(rng, classes))
        # Make some of the predictions correct.
        agree = (rng.random(size) < rng.random()) & np.isin(labels, predictions)
        predictions = np.where(agree, labels, predictions)
        matrix = metrics.ConfusionMatrix(len(classes))
        matrix.update(torch.from_numpy(predictions), torch.from_numpy(labels))
        both = (labels, predictions)

        close(matrix.counts, reference.confusion_matrix(*both, labels=classes), seed)
        close(matrix.accuracy(), reference.accuracy_score(*both), seed)
        close(matrix.balanced_accuracy(), reference.balanced_accuracy_score(*both), seed)
        close(matrix.majority_share(), np.bincount(labels).max() / size, seed)
        close(matrix.matthews_corrcoef(), reference.matthews_corrcoef(*both), seed)
        close(matrix.cohen_kappa(), reference.cohen_kappa_score(*both), seed)
        for average in AVERAGES:
            # By default scikit-learn averages over the classes that occur only.
            which = classes if average is None else None
            expected = reference.precision_recall_fscore_support(
                *both, labels=which, average=average
            )
            actual = (matrix.precision(average), matrix.recall(average), matrix.f1(average))
            for name, ours, theirs in zip(("precision", "recall", "f1"), actual, expected):
                close(ours, theirs, (seed, name, average))


LABEL_SETS = {"both": [0, 1], "negatives only": [0], "positives only": [1]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("allowed", LABEL_SETS.values(), ids=LABEL_SETS)
@pytest.mark.parametrize("decimals", [0, 1, 15], ids=["many ties", "some ties", "no ties"])
def test_random_scores_against_scikit_learn(allowed, decimals):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = rng.integers(1, 100)
        labels = rng.choice(allowed, size)
        scores = (
            (rng.normal(size=size) + rng.random() * labels)
            .round(decimals)
            .astype(rng.choice(["f4", "f8"]))
        )
        ours = torch.from_numpy(scores), torch.from_numpy(labels)
        for name in ("roc_curve", "precision_recall_curve"):
            for actual, expected in zip(
                getattr(metrics, name)(*ours), getattr(reference, name)(labels, scores)
            ):
                assert actual.dtype == torch.float64
                close(actual, expected, (seed, name))
        close(metrics.roc_auc(*ours), reference.roc_auc_score(labels, scores), seed)
        close(
            metrics.average_precision(*ours),
            reference.average_precision_score(labels, scores),
            seed,
        )


@pytest.mark.parametrize("bins", [1, 2, 3, 5, 10, 11, 15, 20, 25])
def test_random_calibration_error_against_a_loop(bins):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        size, classes = rng.integers(1, 100), rng.integers(2, 21)
        probabilities = rng.dirichlet(np.full(classes, rng.uniform(0.05, 1)), size)
        # A third of the rows have a top probability that lies exactly on a bin edge.
        edges = np.arange(bins // 2 + 1, bins + 1) / bins
        top = rng.choice(edges, size)
        on_edge = (1 - top[:, None]) / (classes - 1) * np.ones(classes)
        on_edge[np.arange(size), rng.integers(classes, size=size)] = top
        probabilities = np.where(rng.random((size, 1)) < 1 / 3, on_edge, probabilities)
        labels = np.where(
            rng.random(size) < 0.5, probabilities.argmax(1), rng.integers(classes, size=size)
        )

        expected = 0.0
        for i in range(bins):
            confidence = probabilities.max(1)
            inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
            if inside.any():
                accuracy = (probabilities.argmax(1) == labels)[inside].mean()
                expected += inside.mean() * abs(accuracy - confidence[inside].mean())
        ours = torch.from_numpy(probabilities), torch.from_numpy(labels)
        close(metrics.expected_calibration_error(*ours, bins), expected, seed)


@pytest.mark.quick
def test_figures_of_a_thousand_classes_against_scikit_learn():
    """There were only averages."""
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(990, size=(2, 5000))  # the last ten classes don't occur
    names = [f"class {label}" for label in range(1000)]
    logits = torch.nn.functional.one_hot(torch.from_numpy(predictions), 1000).float()
    named = metrics.evaluation(logits, torch.from_numpy(labels), ["acc"]).named("valid", names)
    expected = reference.precision_recall_fscore_support(
        labels, predictions, labels=range(1000), zero_division=0
    )
    for figure, values in zip(metrics.PER_CLASS[1:], expected):
        found = [named.pop(f"valid/{figure}/{name}") for name in names]
        close(np.array(found), values, figure)
    assert set(named) == {"valid/acc", "valid/majority_share"}


@pytest.mark.quick
@pytest.mark.parametrize("size", [2, 3, 5, 30, 2000])
def test_interval_of_a_mean_against_scipy(size):
    values = np.random.default_rng(size).normal(3, 0.1, size)
    expected = scipy.stats.t.interval(0.95, size - 1, values.mean(), scipy.stats.sem(values))
    assert metrics.mean_interval(values.tolist()) == pytest.approx(expected, rel=1e-5)


def test_counts_do_not_depend_on_batching():
    predictions, labels = random_pairs(np.random.default_rng(0))
    at_once, in_parts = metrics.ConfusionMatrix(5), metrics.ConfusionMatrix(5)
    at_once.update(predictions.view(10, 10), labels.view(10, 10))
    for part in zip(predictions.tensor_split((0, 1, 40)), labels.tensor_split((0, 1, 40))):
        in_parts.update(*part)
    assert at_once.counts.sum() == 100
    assert torch.equal(at_once.counts, in_parts.counts)


def test_sum_merges_counts():
    predictions, labels = random_pairs(np.random.default_rng(1))
    first, second, whole = (metrics.ConfusionMatrix(5) for _ in range(3))
    first.update(predictions[:30], labels[:30])
    second.update(predictions[30:], labels[30:])
    whole.update(predictions, labels)
    before = first.counts.clone(), second.counts.clone()
    merged = first + second
    assert torch.equal(merged.counts, whole.counts)
    merged.update(predictions, labels)
    assert torch.equal(first.counts, before[0]) and torch.equal(second.counts, before[1])


def test_memory_is_constant():
    predictions, labels = random_pairs(np.random.default_rng(2), examples=10_000)
    matrix = metrics.ConfusionMatrix(5)
    size = len(pickle.dumps(matrix))
    matrix.update(predictions, labels)
    assert len(pickle.dumps(matrix)) == size
    assert matrix.counts.dtype == torch.int64 and matrix.counts.shape == (5, 5)
    assert matrix.counts.sum() == 10_000


def test_adding_matrices_of_different_sizes_raises():
    with pytest.raises(RuntimeError, match=r"size of tensor a \(2\) must match"):
        metrics.ConfusionMatrix(2) + metrics.ConfusionMatrix(3)


def test_fewer_than_two_classes_raise():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        metrics.ConfusionMatrix(1)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0], r"predictions \(2,\) and labels \(1,\) differ in shape"),
        ([[0], [1]], [0, 1], r"predictions \(2, 1\) and labels \(2,\) differ in shape"),
        ([0.0, 1.0], [0, 1], "must be int64, got torch.float32 and torch.int64"),
        ([0, 1], [0.0, 1.0], "must be int64, got torch.int64 and torch.float32"),
        ([0, -1], [0, 1], r"predictions contain a value outside 0\.\.2"),
        ([0, 3], [0, 1], r"predictions contain a value outside 0\.\.2"),
        ([0, 1], [0, -1], r"labels contain a value outside 0\.\.2"),
        ([0, 1], [0, 3], r"labels contain a value outside 0\.\.2"),
    ],
)
def test_invalid_update_raises_and_is_not_counted(predictions, labels, message):
    matrix = filled([[1, 0, 0], [0, 0, 2], [0, 0, 0]])
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(predictions), torch.tensor(labels))
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_averages_without_examples_raise(name, average):
    with pytest.raises(ValueError, match="no examples have been counted"):
        getattr(metrics.ConfusionMatrix(3), name)(average)


@pytest.mark.parametrize(
    "name", ["accuracy", "balanced_accuracy", "majority_share", "matthews_corrcoef", "cohen_kappa"]
)
def test_metrics_without_examples_raise(name):
    with pytest.raises(ValueError, match="no examples have been counted"):
        getattr(metrics.ConfusionMatrix(3), name)()


@pytest.mark.parametrize("name", ["precision", "recall", "f1"])
def test_unknown_average_raises(name):
    with pytest.raises(ValueError, match="weighted\" or None, got 'binary'"):
        getattr(filled([[1, 0], [0, 1]]), name)("binary")


@pytest.mark.parametrize(
    "name", ["roc_curve", "roc_auc", "precision_recall_curve", "average_precision"]
)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [0], r"got \(2,\) and \(1,\)"),
        ([[0.1, 0.2]], [[0, 1]], r"got \(1, 2\) and \(1, 2\)"),
        ([], [], r"n > 0, got \(0,\) and \(0,\)"),
        ([0.1, math.nan], [0, 1], "scores contain NaN or infinity"),
        ([0.1, math.inf], [0, 1], "scores contain NaN or infinity"),
        ([0.1, 0.2], [0, 2], "labels must be 0 or 1"),
        ([0.1, 0.2], [-1, 1], "labels must be 0 or 1"),
    ],
)
def test_invalid_scores_raise(name, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(torch.tensor(scores), torch.tensor(labels))


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "message"),
    [
        ([[0.5, 0.5], [0.1, 0.9]], [0], 15, r"got \(2, 2\) and \(1,\)"),
        ([0.5, 0.5], [0, 1], 15, r"got \(2,\) and \(2,\)"),
        (torch.empty(0, 2), [], 15, r"n > 0, got \(0, 2\) and \(0,\)"),
        ([[0.5, math.nan]], [0], 15, "NaN or a value outside"),
        ([[1.5, -0.5]], [0], 15, "NaN or a value outside"),
        ([[0.5, 0.4]], [0], 15, "does not sum to 1"),
        ([[0.5, 0.6]], [0], 15, "does not sum to 1"),
        ([[0.5, 0.5]], [2], 15, r"labels must be integers in 0\.\.1"),
        ([[0.5, 0.5]], [-1], 15, r"labels must be integers in 0\.\.1"),
        ([[0.5, 0.5]], [1.0], 15, r"labels must be integers in 0\.\.1"),
    ],
)
def test_invalid_probabilities_raise(probabilities, labels, bins, message):
    with pytest.raises(ValueError, match=message):
        metrics.expected_calibration_error(
            torch.as_tensor(probabilities), torch.tensor(labels), bins
        )


def test_meter_averages_over_examples():
    meter = Meter()
    meter.add(2, loss=torch.tensor(2.0, requires_grad=True), acc=torch.tensor(1))
    meter.add(4, loss=torch.tensor(1.0, requires_grad=True), acc=torch.tensor(3))
    assert meter.take_row() == {"loss": 3 / 6, "acc": 4 / 6}
    meter.add(2, loss=torch.tensor(4.0), acc=0)
    assert meter.take_row() == {"loss": 2.0, "acc": 0.0}
    assert meter.take_epoch() == {"loss": 7 / 8, "acc": 4 / 8}
    meter.add(3, loss=1.5, acc=3)
    assert meter.take_row() == meter.take_epoch() == {"loss": 0.5, "acc": 1.0}


def test_meter_takes_what_torch_adds():
    meter = Meter()
    with torch.inference_mode():
        meter.add(1, loss=torch.tensor(0.5))
    value = torch.tensor([0.25], dtype=torch.bfloat16)
    meter.add(1, loss=value)
    value.zero_()
    assert meter.take_row() == {"loss": 0.375}


def test_a_mean_is_over_the_examples_with_its_name(monkeypatch):
    meter = Meter()
    meter.add(2, first=2.0)
    meter.add(2, second=4.0)  # of the same batch
    meter.add(2, first=4.0)  # of another
    meter.add(0, rare=0.0)
    others = {"second": 8.0, "second/examples": 2.0, "other": 3.0, "other/examples": 1.0}
    monkeypatch.setattr(distributed, "gather", lambda own: [own, others] if own else [{}])
    assert meter.take_row() == {"first": 1.5, "second": 3.0, "other": 3.0}
    assert meter.take_epoch() == {"first": 1.5, "second": 3.0, "other": 3.0}


def test_meter_state_is_a_snapshot():
    meter, resumed = Meter(), Meter()
    meter.add(2, error=torch.tensor(2.0, requires_grad=True))
    meter.take_row()
    meter.add(4, error=torch.tensor(1.0, requires_grad=True))
    state = meter.state_dict()
    meter.take_row()
    assert state == {
        "sums": {"error": 1.0, "error/examples": 4.0},
        "epoch": {"error": 2.0, "error/examples": 2.0},
    }
    resumed.load_state_dict(state)
    assert (resumed.take_row(), resumed.take_epoch()) == ({"error": 0.25}, {"error": 0.5})
    resumed.load_state_dict(state, state)  # from two ranks
    assert (resumed.take_row(), resumed.take_epoch()) == ({"error": 0.25}, {"error": 4 / 10})


def test_evaluation():
    torch.manual_seed(0)
    logits, labels = 10 * torch.randn(200, 7), torch.randint(7, (200,))
    result = metrics.evaluation(logits, labels)
    exact = logits.double()
    close(result.metrics["loss"], F.cross_entropy(exact, labels))
    close(result.losses, F.cross_entropy(exact, labels, reduction="none"))
    close(result.probabilities, exact.softmax(1))
    assert torch.equal(result.logits, logits) and torch.equal(result.labels, labels)
    assert torch.equal(result.predictions, logits.argmax(1))
    close(result.confusion.counts, reference.confusion_matrix(labels, result.predictions))
    expected = {
        "loss": float(F.cross_entropy(exact, labels)),
        "acc": reference.accuracy_score(labels, result.predictions),
        "balanced_acc": reference.balanced_accuracy_score(labels, result.predictions),
        "mcc": reference.matthews_corrcoef(labels, result.predictions),
        "ece": metrics.expected_calibration_error(exact.softmax(1), labels),
    }
    for name in ("precision", "recall", "f1"):
        for average in ("macro", "micro"):
            function = getattr(reference, f"{name}_score")
            expected[f"{name}_{average}"] = function(labels, result.predictions, average=average)
    assert result.metrics == pytest.approx(expected, rel=0, abs=1e-12)


def test_evaluation_of_two_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 2), torch.randint(2, (200,))
    result = metrics.evaluation(logits, labels).metrics
    assert tuple(result) == tuple(metrics.EVALUATION_METRICS)
    scores = logits.double().softmax(1)[:, 1]
    close(result["roc_auc"], reference.roc_auc_score(labels, scores))
    close(result["average_precision"], reference.average_precision_score(labels, scores))
    # Before, class 1 was always the positive one.
    first = metrics.evaluation(logits, labels, ["roc_auc", "average_precision"], positive=0).metrics
    close(first["roc_auc"], result["roc_auc"])
    close(first["average_precision"], reference.average_precision_score(labels == 0, -scores))
    one_class = metrics.evaluation(logits, torch.ones_like(labels)).metrics
    assert result.keys() - one_class.keys() == {"roc_auc", "average_precision"}


def test_evaluation_of_some_metrics_only(monkeypatch):
    logits, labels = torch.randn(200, 2), torch.randint(2, (200,))
    everything = metrics.evaluation(logits, labels).metrics
    result = metrics.evaluation(logits, labels, ["mcc", "roc_auc", "loss"])
    assert list(result.metrics) == ["mcc", "roc_auc", "loss"]  # in this order
    assert everything == everything | result.metrics
    assert list(result.named("test")) == ["test/mcc", "test/roc_auc", "test/loss"]
    assert metrics.evaluation(logits, labels, []).metrics == {}
    # A metric that is not defined for these labels is left out, one that isn't named isn't computed.
    monkeypatch.setitem(metrics.EVALUATION_METRICS, "ece", None)
    three = metrics.evaluation(torch.randn(200, 3), labels, {"acc": "max", "roc_auc": "max"})
    assert list(three.metrics) == ["acc"]


def test_evaluation_of_an_unknown_metric_raises():
    logits, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="unknown metric 'mae', known are loss, acc, "):
        metrics.evaluation(logits, labels, ["loss", "mae"])
    with pytest.raises(ValueError, match="unknown metric 'mae'"):  # also if the model has diverged
        metrics.evaluation(logits * torch.nan, labels, ["loss", "mae"])


def test_evaluation_of_a_model_that_has_diverged():
    logits, labels = torch.tensor([[torch.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    (loss,) = metrics.evaluation(logits, labels).metrics.values()
    assert math.isnan(loss)
    assert metrics.evaluation(logits, labels, ["acc"]).metrics == {}


def test_interval_is_that_of_resampled_examples():
    labels, predictions = (
        np.repeat([0, 0, 1, 1, 2], [40, 10, 5, 30, 15]),
        np.repeat([0, 1, 0, 1, 2], [40, 10, 5, 30, 15]),
    )
    matrix = metrics.ConfusionMatrix(3)
    matrix.update(torch.from_numpy(predictions), torch.from_numpy(labels))
    rng = np.random.default_rng(0)
    draws = [rng.integers(100, size=100) for _ in range(1000)]
    values = [reference.matthews_corrcoef(labels[drawn], predictions[drawn]) for drawn in draws]
    expected = np.quantile(values, [0.025, 0.975])
    assert metrics.matthews_corrcoef_interval(matrix, resamples=20_000) == pytest.approx(
        expected, abs=0.012
    )
    assert metrics.matthews_corrcoef_interval(matrix) == metrics.matthews_corrcoef_interval(matrix)


def test_interval_of_a_million_examples_takes_a_moment():
    matrix = metrics.ConfusionMatrix(2)
    matrix.counts += torch.tensor([[400_000, 100_000], [100_000, 400_000]])
    low, high = metrics.matthews_corrcoef_interval(matrix)
    # The standard error of the correlation is about sqrt((1 - 0.6²) / n).
    assert 0.6 - low == pytest.approx(1.96 * 0.0008, rel=0.15) and high - 0.6 == pytest.approx(
        1.96 * 0.0008, rel=0.15
    )


def test_evaluation_of_labels_out_of_range_raises():
    with pytest.raises(ValueError, match=r"labels contain a value outside 0\.\.2"):
        metrics.evaluation(torch.zeros(2, 3), torch.tensor([0, 3]))
