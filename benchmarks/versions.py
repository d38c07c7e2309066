"""Run the project on the oldest versions that it supports, those of a year ago, and the newest.

python -m benchmarks.versions [oldest ...] makes an environment for each set, in --directory, and runs in it the tests
that are marked `quick`, a run of each script that is killed and resumed, a sweep with three trials, and a report. An
environment that is already there is used as it is.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
REQUIREMENTS = [REPO / f"requirements{part}.txt" for part in ("", "-sweep", "-report", "-dev")]
# Current in November 2025.
YEAR = """
torch==2.9.1 torchvision==0.24.1 transformers==4.57.1 wandb==0.23.0 numpy==2.3.5 pillow==12.0.0 tqdm==4.67.1
onnx==1.19.1 onnxscript==0.5.6 onnx-ir==0.1.12 optuna==4.6.0 plotly==6.5.0 pytest==9.0.1 scikit-learn==1.7.2
""".split()
# Each set: the version of Python, and what is installed beside the requirements. "==" stands for their lower bounds.
SETS = {
    "oldest": ("3.10", ["=="]),
    "year": ("3.12", YEAR),
    "newest": ("3.13", []),
}
CHECKS = ["quick", "kill", "sweep", "report"]
SHOWN = ("torch", "torchvision", "transformers", "wandb", "numpy", "optuna", "onnx", "onnxscript")
KILLED = """
import random, tempfile
from pathlib import Path
from tests import killing
from tests.conftest import clean_environment
for script in killing.ARGUMENTS:
    cwd = Path(script)
    (cwd / "whole").mkdir(parents=True)
    (cwd / "killed").mkdir()
    environment = clean_environment(cwd)
    seconds = killing.timed(script, cwd / "whole", environment)
    killing.killed_and_resumed(script, cwd / "killed", environment, seconds, random.Random(0))
    differ = killing.differences(cwd / "whole/out", cwd / "killed/out")
    assert not differ, (script, differ)
"""
SWEEP = """
program: PROGRAM
name: three
method: random
metric: {name: valid/loss, goal: minimize}
parameters:
  learning_rate: {values: [0.001, 0.003, 0.01]}
  dataset: {value: synthetic}
  slice: {value: 20}
  epochs: {value: 1}
"""


def requirements() -> list[str]:
    """The requirements of the project and its tests, without the linter, which needs no torch."""
    lines = []
    for file in REQUIREMENTS:
        lines += [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("-r", "ruff"))]


def find_python(version: str) -> str | None:
    """An interpreter of this version, on the path or pyenv's; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for python in filter(None, found):
        if subprocess.run([python, "-V"], capture_output=True).returncode == 0:
            return str(python)
    return None


def make_environment(name: str, directory: Path) -> Path:
    """The interpreter of the environment of a set, which is made unless it is there."""
    version, options = SETS[name]
    needed = requirements()
    if "==" in options:
        needed = [line.replace(">=", "==") for line in needed]
        options = []
    key = hashlib.sha256("\n".join([version, *options, *needed]).encode()).hexdigest()[:8]
    environment = directory / f"{name}-{key}"
    python = environment / "bin/python"
    if (environment / "complete").exists():
        return python
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([find_python(version), "-m", "venv", environment], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):  # several times as fast
        install = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, "--upgrade", "pip"], check=True)
    subprocess.run([*install, *options, *needed], check=True)
    (environment / "complete").touch()
    return python


def installed(python: Path) -> str:
    """The versions of the libraries that matter."""
    program = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {version}" for name, version in zip(SHOWN, done.stdout.split()))


def run_checks(python: Path, names: list[str]) -> dict[str, str]:
    """What came of each of the checks: its time, or that it has failed, whose output is printed."""
    commands = {
        "quick": ["-m", "pytest", "-q", "-m", "quick", "--rootdir", REPO, REPO / "tests"],
        "kill": ["-c", KILLED],
        "sweep": [REPO / "sweep_offline.py", "sweep.yaml", "--count", "3"],
        "report": [REPO / "report.py", "runs/sweep-three"],
    }
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        sweep = SWEEP.replace("PROGRAM", str(REPO / "train_mnist.py"))
        Path(directory, "sweep.yaml").write_text(sweep)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        environment["PATH"] = f"{python.parent}:{environment['PATH']}"
        environment |= {"HOME": directory, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
        for name in names:
            started = time.monotonic()
            done = subprocess.run(
                [python, *commands[name]],
                cwd=REPO if name == "quick" else directory,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            seconds = f"{time.monotonic() - started:.0f} s"
            results[name] = seconds if done.returncode == 0 else f"failed after {seconds}"
            if done.returncode != 0:
                print(f"{python} {name}:\n{done.stdout}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help=f"sets of versions, of {', '.join(SETS)} [all]")
    parser.add_argument(
        "--checks", nargs="+", choices=CHECKS, default=CHECKS, help="what to run [all]"
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--directory",
        type=Path,
        default=cache / "test-environments",
        help="where the environments are [~/.cache/test-environments]",
    )
    args = parser.parse_args()
    failed = False
    rows = [f"| set | Python | libraries | {' | '.join(args.checks)} |"]
    rows.append("|---" * (3 + len(args.checks)) + "|")
    for name in args.sets or SETS:
        version = SETS[name][0]
        if find_python(version) is None:
            print(f"{name}: skipped, because there is no Python {version}", flush=True)
            continue
        python = make_environment(name, args.directory)
        results = run_checks(python, args.checks)
        failed = failed or any("failed" in result for result in results.values())
        row = [name, version, installed(python), *results.values()]
        rows.append(f"| {' | '.join(row)} |")
        print(rows[-1], flush=True)
    print("\n".join(rows))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
