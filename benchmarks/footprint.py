"""Measure peak memory during training, time to the first step, and startup time for --help and for errors.

python -m benchmarks.footprint --data_dir DIR --model BERT_TINY (on Linux)
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import pairs

# Runs a script's main and prints how far, in MB, its peak resident memory rises above the level after the imports.
MEMORY = """
import gc, re, sys
gc.disable()
def megabytes(which):
    return int(re.search(which + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
import numpy, torch, torchvision, transformers, wandb, {script}
imported, train = megabytes("VmRSS"), {script}.train
def train_and_measure(*arguments):
    result = train(*arguments)
    print(f"memory {{megabytes('VmHWM') - imported:.1f}}")
    return result
{script}.train = train_and_measure
{script}.script.run_script(lambda: {script}.main(sys.argv[1:]))
"""


def memory(script: str, options: list[str]) -> float:
    """Rise of peak resident memory from the imports to the end of training, in MB."""
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, "-c", MEMORY.format(script=script), *options]
        done = subprocess.run(
            command, cwd=cwd, env=pairs.OFFLINE, capture_output=True, text=True, check=True
        )
    return float(re.search(r"^memory ([\d.]+)", done.stdout, re.MULTILINE)[1])


def seconds(*command: str | Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], env=pairs.OFFLINE, capture_output=True)
    return time.perf_counter() - started


def seconds_to_first_step(options: list[str]) -> float:
    """Seconds from process start until the journal has its first row, which is that of the first step."""
    with tempfile.TemporaryDirectory() as cwd:
        journal = Path(cwd, "out/history.jsonl")
        command = [
            pairs.REPO / "train_mnist.py",
            *options,
            "--output_dir",
            "out",
            "--log_every",
            "1",
        ]
        started = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=pairs.OFFLINE,
            stdout=subprocess.DEVNULL,
        )
        while not (journal.exists() and journal.stat().st_size):
            if run.poll() is not None:
                raise SystemExit("the run ended before its first step")
            time.sleep(0.002)
        elapsed = time.perf_counter() - started
        run.kill()
        run.wait()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--times", type=int, default=5, help="repetitions of each timing [5]")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    data = ["--data_dir", str(args.data_dir.resolve())]
    mnist, cola = [*data, "--dataset", "mnist"], [*data, "--dataset", "cola", "--model", model]

    import_torch = statistics.median(
        seconds("-c", "import os, torch; os._exit(0)") for _ in range(args.times)
    )
    first_step = statistics.median(seconds_to_first_step(mnist) for _ in range(args.times))
    show_help = statistics.median(
        seconds(pairs.REPO / "train_cola.py", "--help") for _ in range(args.times)
    )
    reject_option = statistics.median(
        seconds(pairs.REPO / "train_cola.py", "--epoch", "3") for _ in range(args.times)
    )
    megabytes = {
        "train_mnist.py": memory("train_mnist", [*mnist, "--epochs", "2"]),
        "train_cola.py": memory("train_cola", [*cola, "--epochs", "2"]),
    }
    rows = [
        f"| train_mnist.py: start to first training step, excluding torch import | {first_step - import_torch:.2f} s |",
        f"| train_cola.py: --help; a misspelt option | {show_help:.2f} s; {reject_option:.2f} s |",
        *(
            f"| {script}: peak resident memory while training, excluding imports | {mb:.0f} MB |"
            for script, mb in megabytes.items()
        ),
    ]
    print(
        pairs.header("footprint of a run", ("torch", "transformers", "wandb"), ("measured",)),
        *rows,
        sep="\n",
    )


if __name__ == "__main__":
    main()
