"""Compare the time per batch of our metrics with torchmetrics and scikit-learn: python -m benchmarks.metrics"""

import time
from collections.abc import Callable

import sklearn.metrics
import torch
import torchmetrics

from benchmarks import pairs
from metrics import ConfusionMatrix

KIND = {"task": "multiclass", "num_classes": 2}
BATCHES = 1000
DATA = [
    (torch.randint(0, 2, (64,)), torch.randint(0, 2, (64,))) for _ in range(BATCHES)
]  # predictions, labels


def ours() -> None:
    confusion = ConfusionMatrix(2)
    for predictions, labels in DATA:
        confusion.update(predictions, labels)
    for average in ("macro", "micro"):
        confusion.precision(average), confusion.recall(average), confusion.f1(average)
    confusion.accuracy(), confusion.matthews_corrcoef()


def six() -> dict[str, torchmetrics.Metric]:
    return {
        "accuracy": torchmetrics.Accuracy(**KIND),
        "precision_macro": torchmetrics.Precision(average="macro", **KIND),
        "precision_micro": torchmetrics.Precision(average="micro", **KIND),
        "recall_macro": torchmetrics.Recall(average="macro", **KIND),
        "recall_micro": torchmetrics.Recall(average="micro", **KIND),
        "f1_macro": torchmetrics.F1Score(average="macro", **KIND),
    }


def one_by_one() -> None:
    metrics = six()
    for predictions, labels in DATA:
        for metric in metrics.values():
            metric(predictions, labels)
    for metric in metrics.values():
        metric.compute()


def collection() -> None:
    metrics = torchmetrics.MetricCollection(six(), compute_groups=True)
    for predictions, labels in DATA:
        metrics.update(predictions, labels)
    metrics.compute()


def scikit_learn() -> None:
    for predictions, labels in ((p.numpy(), t.numpy()) for p, t in DATA):
        sklearn.metrics.accuracy_score(labels, predictions)
        for average in ("macro", "micro"):
            sklearn.metrics.precision_recall_fscore_support(
                labels, predictions, average=average, zero_division=0
            )


def timed(work: Callable[[], None]) -> pairs.Measure:
    def measure() -> dict[str, float]:
        started = time.perf_counter()
        work()
        return {"µs per batch": (time.perf_counter() - started) / BATCHES * 1e6}

    return measure


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, peer in (
        ("six separate torchmetrics objects", one_by_one),
        ("torchmetrics.MetricCollection with compute groups", collection),
        ("scikit-learn", scikit_learn),
    ):
        a, b = pairs.alternate(timed(ours), timed(peer), 5)
        rows.append(pairs.row(f"metrics vs. {name}", a["µs per batch"], b["µs per batch"], "µs"))
    print(pairs.header("batch of 64", ("torch", "torchmetrics", "scikit-learn")), *rows, sep="\n")


if __name__ == "__main__":
    main()
