"""The tracked run: whatever is logged in whatever order, the journal and W&B hold the same rows."""

import json
import random
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from harness import tracking, wandb_service
from tests import forking, killing
from tests.conftest import REPO, clean_environment
from tests.wandb_server import WandbServer, serving

SCRIPT = REPO / "tests/logging_rows.py"
ARGUMENTS = "--epochs 2 --batch_size 5 --checkpoint_every 3 --id same --output_dir out --resume"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def run_script(cwd: Path, seed: int, kill: int | None = None) -> int:
    """The exit status of the script, killed at a call of `run.log`."""
    changes = {"PYTHONPATH": str(REPO), "SEED": str(seed), "KILL": str(kill or -1)}
    environment = clean_environment(cwd, **changes)
    command = [sys.executable, SCRIPT, *ARGUMENTS.split()]
    done = forking.run(command, cwd=cwd, env=environment, text=True, timeout=200)
    if kill is None:
        assert done.returncode == 0, done.stderr
    return done.returncode


def journal_rows(cwd: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cwd / "out/history.jsonl").read_text().splitlines()]


def wandb_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """W&B's rows as the journal has them: numbers only, with their step."""
    kept = []
    for row in rows:
        numbers = {"step": row["_step"]}
        for name, value in row.items():
            value = float("nan") if value == "NaN" else value
            if not name.startswith("_") and isinstance(value, (int, float)):
                numbers[name] = value
        if len(numbers) > 1:
            kept.append(numbers)
    return kept


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """With NaN equal to NaN, and 1 equal to 1.0, as in W&B."""
    return [{name: repr(float(value)) for name, value in sorted(row.items())} for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_journal_and_wandb_hold_the_same_rows_at_any_kill(seed, tmp_path, server: WandbServer):
    rng = random.Random(seed)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run_script(tmp_path / "whole", seed)
    expected = comparable(journal_rows(tmp_path / "whole"))
    steps = [row["step"] for row in journal_rows(tmp_path / "whole")]
    assert steps == sorted(set(steps)) and len(steps) > 15
    cwd = tmp_path / "killed"
    for kill in (rng.randint(1, 60), rng.randint(30, 150), rng.randint(2, 40)):
        if run_script(cwd, seed, kill) == 0:
            break
    run_script(cwd, seed)
    assert comparable(journal_rows(cwd)) == expected
    server.runs.pop("same", None)
    server.history.pop("same", None)
    killing.sync(cwd, clean_environment(cwd), server)
    assert comparable(wandb_rows(server.rows("same"))) == expected
    media = [row for row in server.rows("same") if "histogram" in row]
    assert media and all("image" in row for row in media)


class Silent:
    """What a `Run` needs of a disabled `wandb.Run`."""

    disabled, offline, config, summary = True, False, {}, {}


def fresh(tmp_path: Path) -> tracking.Run:
    return tracking.Run(Silent(), tmp_path / "history.jsonl")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("values", "step", "problem"),
    [
        ({"a": 2}, None, "the row of step 20 has another value of 'a'"),
        ({"a": float("nan")}, 20, "the row of step 20 has another value of 'a'"),
        ({"b": 1}, 19, "step 19 comes after step 20"),
        ({"b": 1}, -1, "step -1 comes after step 20"),
        ({"step": 1}, None, "'step' can't be the name of a metric"),
        ({"_step": 1}, None, "'_step' can't be the name of a metric"),
        ({1: 1}, None, "1 can't be the name of a metric"),
        ({"": 1}, None, "'' can't be the name of a metric"),
        ({"b": {"c": 1}, "b.c": 2}, None, "'b.c' is logged twice"),
        ({"b": {"_c": 1}}, None, "'_c' can't be the name of a metric"),
        (
            {"b": object()},
            None,
            "'b' is of type object: use wandb.Image, wandb.Html or the like",
        ),
    ],
)
def test_what_would_be_lost_is_refused_at_its_line(values, step, problem, tmp_path):
    run = fresh(tmp_path)
    run.log({"a": 1.0}, step=20)
    with pytest.raises(ValueError) as caught:
        run.log(values, step=step)
    assert str(caught.value) == f"run.log in test_tracking.py:{caught.tb.tb_lineno}: {problem}"
    run.log({"a": 1}, step=20, commit=True)
    assert journal(tmp_path) == [{"step": 20, "a": 1.0}]


def journal(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]


@pytest.mark.quick
def test_a_row_that_has_ended_stays_as_it_is(tmp_path):
    run = fresh(tmp_path)
    run.log({"a": 1}, step=20, commit=True)
    run.log({})  # says nothing new
    for step in (None, 20):
        ended = "the row of step 20 has ended$"
        with pytest.raises(ValueError, match=ended):
            run.log({"b": 2}, step=step)
    run.log({"b": 2}, step=40)
    assert journal(tmp_path) == [{"step": 20, "a": 1}]
    assert run.rows == [{"step": 20, "a": 1}, {"step": 40, "b": 2}]
    run.commit()
    run.commit()
    assert journal(tmp_path) == [{"step": 20, "a": 1}, {"step": 40, "b": 2}]


@pytest.mark.quick
def test_numbers_are_logged_as_they_are_at_that_moment(tmp_path):
    run = fresh(tmp_path)
    loss = torch.tensor(0.5)
    run.log({"loss": loss, "n": np.int64(3), "x": np.float32(0.25), "nan": torch.tensor(np.nan)})
    loss.zero_()
    run.log({"nan": float("nan"), "text": "a"})
    run.log({"text": "a"}, commit=True)
    (row,) = journal(tmp_path)
    assert repr(row) == "{'step': 0, 'loss': 0.5, 'n': 3, 'x': 0.25, 'nan': nan}"


@pytest.mark.quick
def test_what_is_changed_later_was_logged_before(tmp_path):
    run = fresh(tmp_path)
    values = {"list": [1, 2], "array": np.ones(2), "tensor": torch.ones(2), "one": [np.float64(1)]}
    run.log(values | {"valid": {"loss": np.array([0.5]), "per class": {"a": 1}}})
    values["list"].append(3)
    values["array"] += 1
    values["tensor"] += 1
    row = run._row
    assert (row["list"], row["array"].tolist(), row["tensor"].tolist()) == ([1, 2], [1, 1], [1, 1])
    assert type(row["one"][0]) is float
    run.commit()
    assert journal(tmp_path) == [{"step": 0, "valid.loss": 0.5, "valid.per class.a": 1}]


@pytest.mark.quick
def test_what_a_checkpoint_keeps_of_a_row_can_be_loaded(tmp_path):
    run = fresh(tmp_path)
    run.log({np.str_("key"): np.str_("text"), "n": np.int64(1), "flag": np.bool_(True)})
    torch.save(run.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["row"] == {"key": "text", "n": 1, "flag": True}
    another = fresh(tmp_path)
    another.load_state_dict(state)
    another.log({"n": 1, "more": 2}, commit=True)
    assert journal(tmp_path) == [{"step": 0, "n": 1, "flag": True, "more": 2}]


@pytest.mark.quick
def test_a_journal_that_cannot_be_written_ends_the_run(tmp_path):
    run = fresh(tmp_path)
    (tmp_path / "history.jsonl").mkdir()

    @tracking.logs_to_wandb
    def log(run: tracking.Run) -> None:
        run.log({"a": 1}, commit=True)

    with pytest.raises(tracking.JournalError):
        log(run)


@pytest.mark.quick
def test_the_users_own_mistakes_are_not_swallowed(tmp_path):
    @tracking.logs_to_wandb
    def log(run: tracking.Run) -> None:
        (tmp_path / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        log(fresh(tmp_path))


def write_log(directory: Path, *records: Record) -> None:
    """W&B's log of the run "same" with these records, as a process that was killed leaves it."""
    content = b":W&B" + bytes(3)
    for record in records:
        data = record.SerializeToString()
        checksum = zlib.crc32(data, zlib.crc32(b"\1"))
        content += struct.pack("<IHB", checksum, len(data), 1) + data
    directory.mkdir(parents=True)
    (directory / "run-same.wandb").write_bytes(content)


@pytest.mark.quick
def test_logs_are_of_a_run_by_its_token(tmp_path, monkeypatch):
    """They were by its id alone, so that those of another run with that id were read and changed."""
    settings = SimpleNamespace(wandb_dir=tmp_path)
    monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=settings))
    row, mine, other, begun = Record(), Record(), Record(), Record()
    row.history.item.add(key="_step", value_json="1")
    mine.config.update.add(key="run_token", value_json='"a"')
    other.config.update.add(key="run_token", value_json='"b"')
    begun.run.config.update.add(key="run_token", value_json='"b"')
    logs = {
        "mine": [mine, row],
        "mine before its first row": [mine],
        "mine continued": [mine, row, other],
        "other": [other, row],
        "other before its first row": [other],
        "other that has just begun": [begun],
        "without token": [row],
        "killed at once": [],
    }
    for name, records in logs.items():
        write_log(tmp_path / f"offline-run-{name}-same", *records)

    def found(token: str | None) -> set[str]:
        files = wandb_service.log_files("same", token)
        return {log.parent.name.removeprefix("offline-run-")[:-5] for log in files}

    assert found("a") == {
        "mine",
        "mine before its first row",
        "mine continued",
        "killed at once",
    }
    assert found(None) == {"without token", "killed at once"}  # begun by an earlier version
    for log in wandb_service.log_files("same", "a"):
        wandb_service.repair_log(log)
    marked = {marker.parent.name for marker in tmp_path.rglob("*.synced")}
    assert marked == {
        "offline-run-mine before its first row-same",
        "offline-run-killed at once-same",
    }


@pytest.mark.quick
def test_the_wandb_run_keeps_its_methods_but_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in clean_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with wandb.init(mode="offline", dir=tmp_path) as inner:
        before = dict(vars(inner))
        tracking.Run(inner, tmp_path / "history.jsonl")
        changed = {name for name in vars(inner) if before.get(name) is not vars(inner)[name]}
        assert changed == {"_log"}
