"""What a run takes before and beside its training: memory over the imports, time to the first step, time to an answer.

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

# Runs a script's main in the process that has imported it, and says by how much the memory grew until training ended.
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
{script}.script.run_script({script}.main)
"""


def memory(script: str, options: list[str]) -> float:
    """MB that the peak of resident memory rose by from the imports to the end of training."""
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, "-c", MEMORY.format(script=script), *options]
        done = subprocess.run(command, cwd=cwd, env=pairs.OFFLINE, capture_output=True, text=True, check=True)
    return float(re.search(r"^memory ([\d.]+)", done.stdout, re.MULTILINE)[1])


def seconds(*command: str | Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], env=pairs.OFFLINE, capture_output=True)
    return time.perf_counter() - started


def seconds_to_first_step(options: list[str]) -> float:
    """From the start of the process until the first row, that of the first step, stands in the journal."""
    with tempfile.TemporaryDirectory() as cwd:
        journal = Path(cwd, "out/history.jsonl")
        command = [pairs.REPO / "train_mnist.py", *options, "--output_dir", "out", "--log_every", "1"]
        started = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=cwd, env=pairs.OFFLINE, stdout=subprocess.DEVNULL
        )
        while not (journal.exists() and journal.stat().st_size):
            if run.poll() is not None:
                raise SystemExit("the run ended before its first step")
            time.sleep(0.002)
        took = time.perf_counter() - started
        run.kill()
        run.wait()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--times", type=int, default=5, help="measurements of each [5]")
    asked = parser.parse_args()
    model = str(Path(asked.model).resolve()) if Path(asked.model).is_dir() else asked.model
    data = ["--data_dir", str(asked.data_dir.resolve())]
    mnist, cola = [*data, "--dataset", "mnist"], [*data, "--dataset", "cola", "--model", model]

    torch = statistics.median(seconds("-c", "import os, torch; os._exit(0)") for _ in range(asked.times))
    first = statistics.median(seconds_to_first_step(mnist) for _ in range(asked.times))
    told = statistics.median(seconds(pairs.REPO / "train_cola.py", "--help") for _ in range(asked.times))
    wrong = statistics.median(seconds(pairs.REPO / "train_cola.py", "--epoch", "3") for _ in range(asked.times))
    megabytes = {
        "train_mnist.py": memory("train_mnist", [*mnist, "--epochs", "2"]),
        "train_cola.py": memory("train_cola", [*cola, "--epochs", "2"]),
    }
    rows = [
        f"| train_mnist.py: start to first training step, over importing torch | {first - torch:.2f} s |",
        f"| train_cola.py: --help; a misspelt option | {told:.2f} s; {wrong:.2f} s |",
        *(
            f"| {script}: peak memory while training, over the imports | {mb:.0f} MB |"
            for script, mb in megabytes.items()
        ),
    ]
    print(pairs.head("what a run takes", ("torch", "transformers", "wandb"), ("measured",)), *rows, sep="\n")


if __name__ == "__main__":
    main()
