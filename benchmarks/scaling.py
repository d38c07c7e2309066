"""Compare training time of several torchrun processes with that of one process.

python -m benchmarks.scaling --data_dir DIR --model BERT_TINY
DIR contains MNIST/raw and cola_public_1.1.zip; BERT_TINY is a directory or the name of a Hugging Face model.
"""

import argparse
from pathlib import Path

from benchmarks import pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, default=2, help="processes, one thread each [2]")
    parser.add_argument("--pairs", type=int, default=3, help="paired runs [3]")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    data_dir = str(args.data_dir.resolve())
    mnist, cola = (
        f"--dataset mnist --data_dir {data_dir}",
        f"--dataset cola --data_dir {data_dir} --model {model}",
    )
    workloads = {
        "MNIST, 2 epochs": ("train_mnist.py", f"{mnist} --epochs 2"),
        "MNIST with `--kernels 64 128`, half an epoch": (
            "train_mnist.py",
            f"{mnist} --kernels 64 128 --slice 2 --epochs 1",
        ),
        "CoLA, 2 epochs": ("train_cola.py", f"{cola} --epochs 2"),
    }

    def run(script: str, options: str, processes: int, threads: int) -> dict[str, float]:
        launcher = f"-m torch.distributed.run --nproc-per-node {processes}".split()
        return pairs.process(
            *launcher, pairs.REPO / script, *options.split(), OMP_NUM_THREADS=str(threads)
        )

    rows, several = [], args.processes
    for work, (script, options) in workloads.items():
        for threads in (1, several):
            a, b = pairs.alternate(
                lambda script=script, options=options: run(script, options, several, 1),
                lambda script=script, options=options, threads=threads: run(
                    script, options, 1, threads
                ),
                args.pairs,
            )
            rows.append(
                pairs.row(
                    f"{work}, one process with {threads} thread(s)", a["training"], b["training"]
                )
            )
    columns = (f"{several} processes, one thread each", "one process", "speedup")
    print(pairs.header("work", ("torch", "transformers", "wandb"), columns), *rows, sep="\n")


if __name__ == "__main__":
    main()
