"""Compare CoLA training time with the Lightning tutorial's and with that of Hugging Face's Trainer.

python -m benchmarks.cola --data_dir DIR --model BERT_TINY
DIR contains cola_public_1.1.zip; BERT_TINY is a directory or the name of a Hugging Face model.
"""

import argparse
from pathlib import Path

from benchmarks import pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, default=1, help="epochs per run [1]")
    parser.add_argument("--pairs", type=int, default=3, help="paired runs [3]")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    data_dir, epochs = str(args.data_dir.resolve()), str(args.epochs)

    def ours() -> dict[str, float]:
        options = f"--dataset cola --data_dir {data_dir} --model {model} --epochs {epochs}"
        return pairs.process(pairs.REPO / "train_cola.py", *options.split())

    def peer(name: str, *options: str) -> dict[str, float]:
        return pairs.process("-m", f"benchmarks.peers.{name}", data_dir, model, epochs, *options)

    print(
        pairs.header(
            "work", ("torch", "transformers", "lightning", "torchmetrics", "accelerate", "wandb")
        )
    )
    peers = {
        "Lightning tutorial": ["cola_lightning"],
        "Trainer": ["cola_trainer", "random"],
        "Trainer, batches of similar length": ["cola_trainer", "group_by_length"],
    }
    for title, command in peers.items():
        a, b = pairs.alternate(ours, lambda command=command: peer(*command), args.pairs)
        print(
            pairs.row(
                f"{title}, {epochs} epoch(s) of training and validation",
                a["training"],
                b["training"],
            )
        )
        print(
            pairs.row(f"{title}, whole process", a["whole process"], b["whole process"]), flush=True
        )


if __name__ == "__main__":
    main()
