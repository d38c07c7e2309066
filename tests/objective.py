"""A fast stand-in for a training script: a known function of x and y, with one value per epoch.

It does what sweep_offline.py requires of a program: --output_dir, --resume, history.jsonl, metrics.json, SIGTERM, SIGUSR1. Each
start appends a line to starts.txt and gpus.txt, each completed run a line to visits.txt.
"""

import argparse
import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("x", "y", "seconds"):
    parser.add_argument(f"--{name}", type=float, default=0.0)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--fail", default="")
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()
if options.fail == "True" or (options.fail == "odd" and options.x % 2):
    sys.exit(f"objective.py: error: x is {options.x:g}")
with Path("starts.txt").open("a") as file:
    file.write(
        f"{options.x:g} {options.y:g} {os.environ['OMP_NUM_THREADS']} {os.environ['WANDB_RUN_GROUP']}\n"
    )
with Path("gpus.txt").open("a") as file:
    file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\n")
time.sleep(0.2)  # stands for slow imports
if options.fail == "stop":
    sys.exit(143)
options.output_dir.mkdir(parents=True, exist_ok=True)
lock = os.open(options.output_dir, os.O_RDONLY)
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(
        number, lambda number, _: sys.exit(0 if options.fail == "quiet" else 128 + number)
    )
journal = options.output_dir / "history.jsonl"
done = len(journal.read_text().splitlines()) if journal.exists() else 0
value = math.nan if options.fail == "nan" else -((options.x - 3) ** 2) - (options.y + 1) ** 2
metric = "none" if options.fail == "other" else "score"
for epoch in range(done + 1, options.epochs + 1):
    time.sleep(options.seconds / options.epochs)
    with journal.open("a") as file:
        file.write(json.dumps({"step": epoch, metric: value - (options.epochs - epoch)}) + "\n")
if options.fail == "garbage":
    journal.write_bytes(
        b'\xff\n{"score"\n["score"]\n{"score": ["score"]}\n{"score": 1' + b"0" * 400 + b"}\n"
    )
    value = 10**400
if not (options.output_dir / "metrics.json").exists():
    (options.output_dir / "metrics.json").write_text(json.dumps({metric: value}))
    with Path("visits.txt").open("a") as file:
        file.write(f"{options.x:g} {options.y:g}\n")
