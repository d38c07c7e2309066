"""What the tests share: the scripts run as users run them, and what they logged, read by W&B's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).parent.parent
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses every connection: no network, on any machine


def clean_environment(home: Path, **changes: str) -> dict[str, str]:
    """An environment of a fresh machine: no account, no network, no W&B settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k not in ("NETRC", "CI")}
    proxies = {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "no_proxy": "127.0.0.1,localhost"}
    return {**kept, **proxies, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **changes}


def call(script: str, *arguments: object, cwd: Path, **environment: str) -> SimpleNamespace:
    """Run a script of the project in `cwd`; its `status`, `out` and `err`."""
    done = subprocess.run(
        [sys.executable, REPO / script, *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(cwd, **environment),
        capture_output=True,
        text=True,
        timeout=200,
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def wandb_records(cwd: Path) -> list[dict]:
    """Every record of the latest W&B run in `cwd`, as `wandb leet inspect` prints them."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", cwd / "wandb/latest-run"]
    printed = subprocess.run(command, env=clean_environment(cwd), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in printed.stdout.splitlines()]


def merged(records: list[dict], kind: str) -> dict:
    """What the updates of W&B's config or summary add up to."""
    state = {}
    for record in records:
        if record["type"] == kind:
            state |= record[kind].get("update", {})
    return state


def finished_run(script: str, cwd: Path, *arguments: object, **environment: str) -> SimpleNamespace:
    """Run a script with `--output_dir out`, which must succeed, and read back all that it left."""
    done = call(script, "--output_dir", "out", *arguments, cwd=cwd, **environment)
    assert done.status == 0, done.err
    out = cwd / "out"
    done.cwd, done.files = cwd, out
    done.journal = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    done.metrics, done.config = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "config"))
    if (cwd / "wandb/latest-run").exists():
        done.records = wandb_records(cwd)
        done.history = [record["history"]["item"] for record in done.records if record["type"] == "history"]
        done.summary = merged(done.records, "summary")
    return done


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run of `train_mnist.py` with everything on, which many tests look at."""
    cwd = tmp_path_factory.mktemp("small_mnist")
    arguments = "--dataset synthetic --slice 5 --valid_size 4000 --epochs 3 --log_model all --save_code"
    return finished_run("train_mnist.py", cwd, *arguments.split(), "--tags", "one", "two words", "--notes", "a note")
