"""Models that W&B has: `--model wandb:ENTITY/PROJECT/NAME:ALIAS` fetches what a run logged, and trains on from it."""

import base64
import dataclasses
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from safetensors.torch import load, load_file

import train_cola
from harness import script
from tests import killing
from tests.conftest import call, clean_environment, made_once
from tests.wandb_server import MANIFEST, Artifact, WandbServer, serving

SCRIPT, WEIGHTS = "train_cola.py", "model.safetensors"
SENTENCES = f"--train_file {killing.SHORT} --valid_file {killing.SHORT} --batch_size 7"
NO_SERVER = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    """A server that has the models of two epochs of `train_cola.py`, and one of `train_mnist.py`."""
    with serving() as server:
        server.logged, server.artifacts = made_once(tmp_path_factory, "logged", log_models)
        yield server


def log_models(cwd: Path) -> tuple[Path, dict[str, Artifact]]:
    """The directory of both runs, and the artifacts that they logged."""
    cola = f"{SENTENCES} --model scratch --epochs 2 --id first --log_model all"
    mnist = f"{killing.DIGITS} --valid_size 1000 --max_steps 2 --id digits --log_model best"
    with serving() as server:
        for name, arguments in ((SCRIPT, cola), ("train_mnist.py", mnist)):
            done = run(name, server, cwd / name, arguments)
            assert done.status == 0, done.err
        return cwd, server.artifacts


def run(
    name: str, server: WandbServer, cwd: Path, arguments: str, **environment: str
) -> SimpleNamespace:
    """A run that logs to the server; returns its `status`, `out` and `err`."""
    cwd.mkdir()
    variables = {**server.environment(), **environment}
    return call(name, *arguments.split(), "--output_dir", "out", cwd=cwd, **variables)


def offer(
    server: WandbServer, name: str, change: Callable[[Files], None] = lambda files: None
) -> str:
    """Offer the best model as tester/cola/`name` too, its files changed; returns what `--model` calls it."""
    model = server.find_artifact("tester", "cola", "model-first:best")
    files = dict(model.files)
    change(files)
    id, place = f"{name}-id", ("tester", "cola", name)
    server.artifacts[id] = dataclasses.replace(
        model, id=id, place=place, version=0, aliases=["latest"], files=files
    )
    return f"wandb:tester/cola/{name}:latest"


@pytest.fixture
def here(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], int]]:
    """Runs `train_cola.py` in this process, for speed, with other arguments; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [SCRIPT])
    for name, value in clean_environment(tmp_path, **server.environment()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    wandb.teardown()  # or W&B would keep to the environment before
    yield lambda arguments: script.status_of(
        lambda: train_cola.main([*arguments.split(), "--output_dir", "out"])
    )
    wandb.teardown()


# ----------------------------------------------------------------------------------------------- training on


@pytest.mark.parametrize("alias", ["best", "latest", "v0"])
def test_run_begins_with_the_model_of_another(server, here, alias):
    name = f"wandb:tester/cola/model-first:{alias}"
    arguments = f"{SENTENCES} --model {name} --learning_rate 1e-12 --max_steps 1 --id next-{alias}"
    assert here(arguments) == 0
    artifact = server.find_artifact("tester", "cola", f"model-first:{alias}")
    begun = torch.load("out/checkpoint.previous.pt", weights_only=True)
    assert begun["position"]["step"] == 0 and killing.same(
        begun["model"], load(artifact.files[WEIGHTS])
    )
    assert [artifact_id for run_id, artifact_id in server.used if run_id == f"next-{alias}"] == [
        artifact.id
    ]
    if alias == "best":
        first = server.logged / SCRIPT / "out"
        assert killing.same(begun["model"], load_file(first / "model" / WEIGHTS))
        before, after = (
            json.loads((out / "metrics.json").read_text()) for out in (first, Path("out"))
        )
        assert after["model"] == name and after["valid/loss"] == pytest.approx(
            before["valid/loss"], rel=1e-4
        )
        Path("out/metrics.json").unlink()
        assert (
            here(f"{arguments} --resume --wandb offline") == 0 and Path("out/metrics.json").exists()
        )


# -------------------------------------------------------------------------------------------------- resuming


def test_killed_run_goes_on_with_what_it_fetched(server, tmp_path):
    name = offer(server, "moves")

    def start(directory: str, *more: str, **changes: str) -> subprocess.Popen:
        cwd = tmp_path / directory
        cwd.mkdir(exist_ok=True)
        environment = clean_environment(cwd, **{**server.environment(), **changes})
        return killing.start(
            SCRIPT, cwd, environment, "--model", name, "--epochs", "2", "--watch", "off", *more
        )

    # With the same id it would take the other's place on the server, which would be refused.
    reference = start("reference", "--id", "reference")
    for more in ([], ["--resume"]):
        process = start("killed", *more)
        assert killing.wait_for_writes(process, tmp_path / "killed/out", 3)
        assert killing.kill(process, 0, everything=True)
        if not more:  # from now on, the alias is that of a model which does not fit
            killing.finish(reference)
            server.artifacts["moves-id"].aliases = []
            digits = server.find_artifact("tester", "mnist", "model-digits:best")
            server.artifacts["moved-id"] = dataclasses.replace(
                digits, place=("tester", "cola", "moves"), version=1
            )
    out = killing.finish(start("killed", "--resume", **NO_SERVER))
    assert "!!  W&B can't be used:" in out
    assert killing.differences(tmp_path / "reference/out", tmp_path / "killed/out") == []
    assert sorted(use for use in server.used if use[0] in ("reference", "same")) == [
        ("reference", "moves-id"),
        ("same", "moves-id"),
    ]  # at the start


# ------------------------------------------------------------------------------------------- what can't be used


def listing(files: Files, change: Callable[[dict], None]) -> None:
    """Change the entries of the manifest."""
    manifest = json.loads(files[MANIFEST])
    change(manifest["contents"])
    files[MANIFEST] = json.dumps(manifest).encode()


def not_stored(files: Files) -> None:
    del files[WEIGHTS]


def not_listed(files: Files) -> None:
    listing(files, lambda entries: entries.pop(WEIGHTS))


def changed_since(files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:-1] + bytes([files[WEIGHTS][-1] ^ 1])


def cut_since(files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:-100]


def logged_damaged(files: Files) -> None:
    files[WEIGHTS] = bytes(1000)
    digest = base64.b64encode(hashlib.md5(files[WEIGHTS]).digest()).decode()
    listing(files, lambda entries: entries[WEIGHTS].update(digest=digest, size=1000))


UNUSABLE = {
    "wandb:tester/cola/model-none:best": "artifact membership 'model-none:best' not found in 'tester/cola'",
    "wandb:tester/cola/model-first:none": "artifact membership 'model-first:none' not found in 'tester/cola'",
    "wandb:tester/none/model-first:best": "project 'none' not found under entity 'tester'",
    "wandb:a/b/c/d": "Invalid artifact path: 'a/b/c/d'",
    "wandb:tester/mnist/model-digits:best": "it can't be used: Unrecognized model in it.",
    not_stored: "404 Client Error: Not Found for url: http://127.0.0.1",
    not_listed: "it can't be used: Error no file named model.safetensors",
    changed_since: "Digest mismatch for file: model.safetensors",
    cut_since: "Digest mismatch for file: model.safetensors",
    logged_damaged: "it can't be used: the file of its weights is damaged",
}


@pytest.mark.parametrize(
    "model", UNUSABLE, ids=lambda model: model if isinstance(model, str) else model.__name__
)
def test_model_that_cannot_be_used_is_one_line(server, here, capfd, model):
    name = model if isinstance(model, str) else offer(server, model.__name__, model)
    started = time.monotonic()
    assert here(f"{SENTENCES} --model {name}") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("wandb:")]
    (line,) = lines
    assert line.startswith(f"train_cola.py: error: --model {name} can't be used: {UNUSABLE[model]}")
    assert not Path("out").exists()
    assert time.monotonic() - started < 60  # W&B tries some failures again for twenty minutes


def test_new_run_needs_the_server(server, here, capfd, monkeypatch):
    monkeypatch.setattr(server, "mode", "forbidden")
    name = "wandb:tester/cola/model-first:best"
    assert here(f"{SENTENCES} --model {name}") == 2
    err = capfd.readouterr().err
    message = f"train_cola.py: error: --model {name} can't be used: Cannot use artifact when in offline mode."
    assert (
        "!!  W&B can't be used:" in err
        and "Traceback" not in err
        and err.splitlines()[-1] == message
    )
