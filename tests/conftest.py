"""Shared helpers: run the scripts as users do, and read what they logged with W&B's own reader."""

import gc
import importlib.util
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

# Tests see no GPU: their figures are a CPU's, and a forked process can't use CUDA. Set before torch is imported, and
# inherited by the workers and by all processes that tests start. Those of the marker `gpu` get the GPUs back.
GPUS = os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Where pandas is installed, scikit-learn imports it, and it pyarrow. A thread of pyarrow's allocator crashed workers.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
gc.disable()  # until everything is imported: a quarter of the time of the imports

import torch
from filelock import FileLock

from tasks.digits import Digits
from tests import forking

REPO = Path(__file__).parent.parent
DEAD_PROXY = "http://127.0.0.1:9"  # a proxy that refuses every connection, to cut off the network


def pytest_configure() -> None:
    """One thread for each run, and for the tests: the workers use all cores. `nohup` ignores SIGHUP."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Three workers for two cores, since a third of the time is spent waiting; with `-m`, one for each core."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    cores = os.cpu_count() or 1
    return cores if config.option.markexpr else cores * 3 // 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that mostly wait come first, so that they do not hold up the end."""
    waiting = (
        "test_wandb_fails.py",
        "test_wandb_models.py",
        "test_storage.py",
        "test_hosts.py",
        "test_models.py",
        "test_watch.py",
    )
    items.sort(key=lambda item: item.path.name not in waiting)


def pytest_collection_finish() -> None:
    forking.remember_environment()  # the imports of the tests have set variables
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Undo what libraries set while a test runs: with another environment, later runs could not be forked."""
    with mock.patch.dict(os.environ):
        return (yield)


def clean_environment(home: Path, **changes: str) -> dict[str, str]:
    """The environment of a fresh machine: no account, no network, no W&B settings."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("WANDB_") and k not in ("NETRC", "CI")
    }
    proxies = {
        "http_proxy": DEAD_PROXY,
        "https_proxy": DEAD_PROXY,
        "no_proxy": "127.0.0.1,localhost",
    }
    return {**kept, **proxies, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **changes}


def call(
    script: str, *arguments: object, cwd: Path, real: bool = False, **environment: str
) -> SimpleNamespace:
    """Run a project script in `cwd`; return its `status`, `out` and `err`. `real`: in a new interpreter."""
    command = [sys.executable, REPO / script, *map(str, arguments)]
    popen = subprocess.Popen if real else forking.Popen
    done = forking.run(
        command, popen, cwd=cwd, env=clean_environment(cwd, **environment), text=True, timeout=600
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def write_mnist(root: Path, digits: Digits, folder: str = "MNIST") -> Path:
    """Write digits in MNIST's format; returns the directory of the files."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, (images, labels) in {"train": digits.train, "t10k": digits.test}.items():
        header = struct.pack(">4i", 0x803, len(labels), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">2i", 0x801, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            header + labels.to(torch.uint8).numpy().tobytes()
        )
    return raw


def wandb_records(cwd: Path) -> list[dict]:
    """All records of the latest W&B run in `cwd`, as printed by `wandb leet inspect`."""
    if not importlib.util.find_spec("wandb.cli.leet"):
        return list(records_of_older_wandb(next((cwd / "wandb/latest-run").glob("*.wandb"))))
    command = [
        Path(sys.executable).with_name("wandb"),
        "leet",
        "inspect",
        "--json",
        cwd / "wandb/latest-run",
    ]
    printed = forking.run(command, cwd=cwd, env=clean_environment(cwd), text=True)
    assert printed.returncode == 0, printed.stderr
    return [json.loads(line) for line in printed.stdout.splitlines()]


def records_of_older_wandb(log: Path) -> Iterator[dict]:
    """The same as `wandb leet inspect` prints, with the reader that W&B had before."""
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    def plain(value: Any) -> Any:
        if isinstance(value, list) and value and "value_json" in value[0]:
            keys = (".".join(item.get("nested_key") or [item["key"]]) for item in value)
            return dict(zip(keys, (json.loads(item["value_json"]) for item in value)))
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return value

    store = DataStore()
    store.open_for_scan(str(log))
    while data := store.scan_data():
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        content = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
        yield {"num": record.num, "type": kind, kind: plain(content)}


def merged(records: list[dict], kind: str) -> dict:
    """Merge all updates of W&B's config or summary; the run begins with a config."""
    state = {}
    for record in records:
        if record["type"] == "run" and kind == "config":
            state |= record["run"].get("config", {}).get("update", {})
        if record["type"] == kind:
            state |= record[kind].get("update", {})
    return state


def finished_run(script: str, cwd: Path, *arguments: object, **options: Any) -> SimpleNamespace:
    """Run a script with `--output_dir out`, check that it succeeds, and read back its files and W&B records."""
    done = call(script, "--output_dir", "out", *arguments, cwd=cwd, **options)
    assert done.status == 0, done.err
    out = cwd / "out"
    done.cwd, done.files = cwd, out
    done.journal = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    done.metrics, done.config = (
        json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "config")
    )
    if (cwd / "wandb/latest-run").exists():
        done.records = wandb_records(cwd)
        done.history = [
            record["history"]["item"] for record in done.records if record["type"] == "history"
        ]
        done.summary = merged(done.records, "summary")
    return done


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What `make(directory)` returns: the first worker that needs it makes it, the others wait for it and read it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the directory of all workers
    directory, made = base / name, base / f"{name}.pickle"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(directory, ignore_errors=True)  # left by a worker that failed
            directory.mkdir()
            new = base / f"{name}.new"
            new.write_bytes(pickle.dumps(make(directory)))
            new.replace(made)
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A `train_mnist.py` run with everything on, shared by many tests."""
    arguments = "--dataset synthetic --slice 5 --valid_size 4000 --epochs 3 --log_model all --save_code".split()
    arguments += ["--tags", "one", "two words", "--notes", "a note"]
    return made_once(
        tmp_path_factory, "small_mnist", lambda cwd: finished_run("train_mnist.py", cwd, *arguments)
    )


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """For each script, an uninterrupted run and its history on the server."""
    from tests import killing  # which imports this module

    if not importlib.util.find_spec("wandb.cli.clean"):
        pytest.skip(
            "`wandb sync` before W&B 0.29 asks the tests' server what it can't answer, without end"
        )
    return {
        script: made_once(
            tmp_path_factory, f"reference-{script}", partial(killing.reference, script)
        )
        for script in killing.ARGUMENTS
    }


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, which records its console and every request."""
    chromium, driver = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if not (chromium and driver):
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--enable-unsafe-swiftshader",
    ):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()
