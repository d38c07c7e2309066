"""Compare MNIST training time with W&B's PyTorch tutorial and the official PyTorch example.

python -m benchmarks.mnist --data_dir DIR
DIR contains MNIST/raw, as torchvision stores it. Our options for 99.0% were chosen on 5,000 held-out training images;
the example stops after the first epoch that reaches it on the test images.
"""

import argparse
from pathlib import Path

from benchmarks import pairs

TUTORIAL = "--slice 5 --valid_size 0 --schedule constant --seed 1".split()
FAST = "--valid_size 0 --max_steps 450 --learning_rate 0.015 --label_smoothing 0.05 --watch off".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3, help="paired runs [3]")
    parser.add_argument("--seeds", type=int, default=10, help="seeds for the 99.0%% check [10]")
    args = parser.parse_args()
    data_dir = args.data_dir.resolve()

    def ours(*options: str) -> dict[str, float]:
        return pairs.process(
            pairs.REPO / "train_mnist.py", "--dataset", "mnist", "--data_dir", data_dir, *options
        )

    def peer(name: str) -> dict[str, float]:
        return pairs.process("-m", f"benchmarks.peers.{name}", data_dir)

    a, b = pairs.alternate(lambda: ours(*TUTORIAL), lambda: peer("mnist_tutorial"), args.pairs)
    rows = [
        pairs.row(f"W&B tutorial on MNIST, {time}", a[time], b[time])
        for time in ("whole process", "training")
    ]
    a, b = pairs.alternate(lambda: ours(*FAST), lambda: peer("mnist_example"), args.pairs)
    rows.append(pairs.row("full MNIST to 99.0%, training", a["training"], b["training"]))
    accuracies = sorted(ours(*FAST, "--seed", str(seed))["accuracy"] for seed in range(args.seeds))
    print(pairs.header("work", ("torch", "torchvision", "wandb")), *rows, sep="\n")
    passed = sum(accuracy >= 0.99 for accuracy in accuracies)
    print(
        f"\n99.0% reached with {passed} of {args.seeds} seeds, accuracy {accuracies[0]:.2%} to {accuracies[-1]:.2%}"
    )


if __name__ == "__main__":
    main()
