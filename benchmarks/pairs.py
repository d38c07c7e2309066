"""Compare two programs by the medians of paired runs, measured alternately, as rows of a Markdown table."""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).parent.parent
PATHS = filter(None, [str(REPO), os.environ.get("PYTHONPATH")])
OFFLINE = os.environ | {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "PYTHONPATH": os.pathsep.join(PATHS),
}
Measure = Callable[[], dict[str, float]]  # makes one run and returns its measurements by name


def alternate(
    ours: Measure, peer: Measure, pairs: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of each side's measurements over the pairs."""
    measured: tuple[list, list] = ([], [])
    for number in range(pairs):
        for measure, results in zip((ours, peer), measured):
            results.append(measure())
        print(
            f"pair {number + 1}: {measured[0][-1]} {measured[1][-1]}", file=sys.stderr, flush=True
        )
    return tuple(
        {name: statistics.median(r[name] for r in results) for name in results[0]}
        for results in measured
    )


def process(*command: str | Path, **environment: str) -> dict[str, float]:
    """Run Python with these arguments in an empty directory, offline; return wall time (s) and what it reports."""
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, *map(str, command)]
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=cwd, env=OFFLINE | environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {"whole process": seconds, **reported(done.stdout)}


def reported(output: str) -> dict[str, float]:
    """Training time (s) and accuracy from the epoch lines of our scripts, or from the last line of a peer."""
    if epochs := epoch_seconds(output):
        accuracy = re.findall(r"test accuracy ([\d.]+)%", output)
        return {"training": sum(epochs)} | (
            {"accuracy": float(accuracy[0]) / 100} if accuracy else {}
        )
    return {
        name: float(number)
        for name, number in re.findall(r"(training|accuracy|epochs) ([\d.]+)", output)
    }


def epoch_seconds(output: str) -> list[float]:
    """The seconds of each epoch, as our scripts print them."""
    return [float(text) for text in re.findall(r"^epoch \d+: .* ([\d.]+) s$", output, re.MULTILINE)]


def row(work: str, ours: float, peer: float, unit: str = "s") -> str:
    return f"| {work} | {ours:.3g} {unit} | {peer:.3g} {unit} | {peer / ours:.2f} |"


def header(
    title: str, libraries: tuple[str, ...], columns: tuple[str, ...] = ("ours", "peer", "speedup")
) -> str:
    """The machine and versions, then the heading of a Markdown table."""
    processor = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        listed = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
        processor = (re.findall(r"Model name: *(.*)", listed) or [processor])[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{library} {version(library)}" for library in libraries)
    line = f"{processor}, {cores} cores, Python {platform.python_version()}, {versions}"
    return f"{line}\n\n| {' | '.join((title, *columns))} |\n{'|---' * (1 + len(columns))}|"
