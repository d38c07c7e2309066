"""Two processes of torchrun beside one, a thread each. python -m benchmarks.scaling --data_dir DIR --model BERT_TINY

DIR holds MNIST/raw and cola_public_1.1.zip; BERT_TINY is a directory or a model of the hub.
"""

import argparse
from pathlib import Path

from benchmarks import pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, default=2, help="of the larger side [2]")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side [3]")
    asked = parser.parse_args()
    model = str(Path(asked.model).resolve()) if Path(asked.model).is_dir() else asked.model
    data_dir = str(asked.data_dir.resolve())
    mnist, cola = f"--dataset mnist --data_dir {data_dir}", f"--dataset cola --data_dir {data_dir} --model {model}"
    works = {
        "MNIST, 2 epochs": ("train_mnist.py", f"{mnist} --epochs 2"),
        "MNIST with `--kernels 64 128`, half an epoch": (
            "train_mnist.py",
            f"{mnist} --kernels 64 128 --slice 2 --epochs 1",
        ),
        "CoLA, 2 epochs": ("train_cola.py", f"{cola} --epochs 2"),
    }

    def run(script: str, options: str, processes: int, threads: int) -> dict[str, float]:
        launcher = f"-m torch.distributed.run --nproc-per-node {processes}".split()
        return pairs.process(*launcher, pairs.REPO / script, *options.split(), OMP_NUM_THREADS=str(threads))

    rows, several = [], asked.processes
    for work, (script, options) in works.items():
        for threads in (1, several):
            a, b = pairs.alternate(
                lambda script=script, options=options: run(script, options, several, 1),
                lambda script=script, options=options, threads=threads: run(script, options, 1, threads),
                asked.pairs,
            )
            rows.append(pairs.row(f"{work}, beside one process of {threads} thread(s)", a["training"], b["training"]))
    columns = (f"{several} processes of a thread", "one process", "times faster")
    print(pairs.head("work", ("torch", "transformers", "wandb"), columns), *rows, sep="\n")


if __name__ == "__main__":
    main()
