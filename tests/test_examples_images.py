"""examples/train_images.py and harness/loading.py: a DataLoader's workers cost no bit, no signal and no lock."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from examples.train_images import Settings, load, load_weights, make_model
from harness import distributed
from harness.errors import UserError
from harness.loading import iterate, load_batches
from harness.system import STOP_SIGNALS
from tests import forking, killing
from tests.conftest import clean_environment, finished_run, made_once

SCRIPT = "examples/train_images.py"
DISABLED = ("--wandb", "disabled")
PLAIN = [*"--norm group --epochs 1 --log_every 1 --precision fp32".split(), *DISABLED]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An uninterrupted run with two workers."""
    arguments = [*killing.EXAMPLES[SCRIPT].split(), "--id", "same"]
    return made_once(
        tmp_path_factory, "reference-images", lambda cwd: finished_run(SCRIPT, cwd, *arguments)
    )


def start(cwd: Path, *more: str) -> subprocess.Popen:
    return killing.start(SCRIPT, cwd, clean_environment(cwd), *DISABLED, *more)


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
    return [int(number) for number in found.stdout.split()]


def wait_for_rows(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while count and not len(rows(out)) >= count and process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.01)


def rows(out: Path) -> list[dict]:
    with contextlib.suppress(OSError):
        return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return []


def losses(out: Path) -> list[float]:
    return [row["train/loss_step"] for row in rows(out) if "train/loss_step" in row]


# ------------------------------------------------------------------------------------------------- the example


def test_run_leaves_its_files(reference):
    names = {path.name for path in reference.files.iterdir()}
    assert {"model.onnx", "model.pt", "curves.png", "confusion_matrix.png"} <= names
    assert "test_confusion_matrix.png" in names  # of the data that the headline is about
    assert reference.config["metrics"] == {
        "loss": "min",
        "acc": "max",
        "f1_macro": "max",
        "ece": "min",
    }
    assert {"best/epoch", "valid/loss", "test/acc"} <= reference.metrics.keys()
    logged = {name.partition(".")[0] for row in reference.history for name in row}
    assert {"valid/mistakes", "test/confusion_matrix_image", "curves"} <= logged
    assert len((reference.files / "predictions.csv").read_text().splitlines()) == 1 + 80


def test_killed_at_random_moments(reference, tmp_path):
    """Only the training process is killed. The next one starts at once, while its workers still wait for work."""
    rng = random.Random(0)
    left_over = []
    for kills in range(4):
        process = start(tmp_path, "--resume")
        wait_for_rows(process, tmp_path / "out", 3 * kills)
        time.sleep(rng.uniform(0, 0.4))
        workers = children(process)
        process.kill()
        process.wait()
        process.stdout.close()  # they have it too
        left_over += [pid for pid in workers if os.path.exists(f"/proc/{pid}/cwd")]
    killing.finish(start(tmp_path, "--resume"))
    assert killing.differences(reference.files, tmp_path / "out") == []
    assert left_over


def test_signals_to_the_whole_group(reference, tmp_path):
    rng = random.Random(1)
    statuses = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        process = start(tmp_path, "--resume")
        wait_for_rows(process, tmp_path / "out", len(rows(tmp_path / "out")) + 1)
        time.sleep(rng.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):  # it has finished
            os.killpg(process.pid, number)
        out = process.communicate(timeout=100)[0].decode()
        assert "Traceback" not in out, out
        if process.returncode:
            assert process.returncode == 128 + number
            assert f"stopped by {number.name} at step " in out
        statuses.append(process.returncode)
    assert sum(map(bool, statuses)) >= 2
    killing.finish(start(tmp_path, "--resume"))
    assert killing.differences(reference.files, tmp_path / "out") == []


@pytest.mark.parametrize("workers", ["0", "1"])
def test_number_of_workers_changes_no_bit(workers, reference, tmp_path):
    killing.finish(start(tmp_path, "--workers", workers))
    assert killing.differences(reference.files, tmp_path / "out") == []


def test_two_processes_and_micro_batches_agree_with_one(tmp_path):
    """Augmentation included; the last batch has 12 images."""
    launcher = [*forking.TORCHRUN, "--nproc-per-node", "2"]
    outs = []
    for name, more in (("one", []), ("parts", ["--micro_batch_size", "5"]), ("two", launcher)):
        cwd = tmp_path / name
        cwd.mkdir()
        if more is launcher:
            command = [sys.executable, *launcher, killing.REPO / SCRIPT, *PLAIN]
            command += [*killing.EXAMPLES[SCRIPT].split(), *PLAIN, "--output_dir", "out"]
            done = forking.run(command, cwd=cwd, env=clean_environment(cwd), text=True)
            assert done.returncode == 0, done.stderr
        else:
            killing.finish(start(cwd, *PLAIN, *more))
        outs.append(losses(cwd / "out"))
    one, *others = outs
    assert len(one) == 14
    for other in others:
        assert other[:4] == pytest.approx(one[:4], rel=1e-3)
        assert other == pytest.approx(one, rel=0.2)  # the optimizer amplifies the rounding


def test_batch_norm_is_refused_under_torchrun(tmp_path):
    command = [sys.executable, *forking.TORCHRUN, "--nproc-per-node", "2", killing.REPO / SCRIPT]
    command += [*killing.EXAMPLES[SCRIPT].split(), *DISABLED]
    done = forking.run(command, cwd=tmp_path, env=clean_environment(tmp_path), text=True)
    line = "train_images.py: error: running statistics, as of BatchNorm, would differ between"
    assert done.returncode != 0 and done.stderr.count(line) == 1, done.stderr
    assert 'train_images.py", line' not in done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_in_mid_epoch_ends_in_one_line(workers, folder, tmp_path):
    """Pillow's check of a JPEG reads the header only."""
    for path in sorted((folder / "a").iterdir())[::2]:
        path.with_suffix(".jpg").write_bytes(path.read_bytes()[:400])
        path.unlink()
    process = start(tmp_path, "--folder", str(folder), "--workers", str(workers))
    out = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 2 and "Traceback" not in out
    last = out.splitlines()[-1]
    assert last.startswith(f"train_images.py: error: {folder}/a/") and "can't be read: " in last


def test_traceback_is_not_held_up_by_workers(tmp_path):
    """Neither if the error is a worker's, nor in the loop. Python keeps the frames of a traceback, and their loader."""
    for change in (
        "train_images.read_image = lambda path: 1 / 0",
        "train_images.Meter.add = lambda *_, **__: 1 / 0",
    ):
        # Workers of a fork server would not have the change.
        fork = "import multiprocessing; multiprocessing.set_start_method('fork'); "
        process = killing.start_changed(
            SCRIPT, tmp_path, clean_environment(tmp_path), fork + change, *DISABLED, "--resume"
        )
        out = process.communicate(timeout=100)[0].decode()
        assert process.returncode == 1 and "ZeroDivisionError: " in out, out


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 12 images, saved as JPEG whatever their names say."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number in range(40):
            image = Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8))
            image.save(tmp_path / f"folder/{name}/{number}.png", format="jpeg")
    return tmp_path / "folder"


def test_folders_that_are_none(folder, tmp_path):
    def message(path: Path) -> str:
        with pytest.raises(UserError) as raised:
            load(Settings(folder=str(path)))
        assert raised.value.status == 2
        return str(raised.value)

    assert "No such file" in message(tmp_path / "nowhere")
    assert "Not a directory" in message(folder / "a/0.png")
    (tmp_path / "empty").mkdir()
    assert "any class folder" in message(tmp_path / "empty")
    (folder / "c").mkdir()
    assert "classes c" in message(folder)
    (folder / "c/0.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"c/0.png can't be read"):
        load(Settings(folder=str(folder))).train.dataset[80]
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(folder / "c/0.png")
    with pytest.raises(UserError, match="its mode is I;16; 8 bits"):
        load(Settings(folder=str(folder))).train.dataset[80]
    Image.new("LA", (32, 32)).save(folder / "c/0.png")  # what is drawn by transparency was lost
    with pytest.raises(UserError, match="save it without transparency"):
        load(Settings(folder=str(folder))).train.dataset[80]
    one = tmp_path / "one"
    one.mkdir()
    (folder / "a").rename(one / "a")
    assert "needs two classes" in message(one)


def test_photos_are_upright_and_other_files_are_counted(folder, capsys):
    """Photos were seen as the sensor lay; images with other suffixes were left out in silence."""
    camera = Image.Exif()
    camera[0x112] = 6  # to be turned clockwise
    photo = Image.new("RGB", (32, 32))
    photo.paste((255, 255, 255), (0, 0, 32, 16))
    photo.save(folder / "a/0.png", exif=camera)
    photo.save(folder / "a/1.gif")
    images = load(Settings(folder=str(folder))).test.dataset
    pixels, _ = images[0]
    assert pixels[:, :, 17:].min() == 1 and pixels[:, :, :15].max() == 0
    assert capsys.readouterr().out == "classes: a, b; 1 other files are left out\n"


def test_split_follows_from_the_names(folder):
    data = load(Settings(folder=str(folder)))
    sizes = [len(part) for part in (data.train, data.valid, data.test)]
    assert sizes == [54, 13, 13]
    assert sum(data.valid.dataset.targets[i] for i in data.valid.indices) == 7
    assert sorted([*data.train.indices, *data.valid.indices, *data.test.indices]) == [*range(80)]
    files = [path.read_bytes() for path in sorted((folder / "a").iterdir())]
    for path in (folder / "a").iterdir():
        path.unlink()
    for number, content in sorted(enumerate(files), key=lambda _: random.random()):
        (folder / f"a/{sorted(map(str, range(40)))[number]}.png").write_bytes(content)
    again = load(Settings(folder=str(folder)))
    assert again.content == data.content and again.valid.indices == data.valid.indices


def test_weights_of_another_run(folder, tmp_path, capsys):
    data = load(Settings(folder=str(folder)))
    capsys.readouterr()  # what load says
    cpu = torch.device("cpu")
    begun = make_model(Settings(), data, cpu)
    torch.save(begun.state_dict(), tmp_path / "model.pt")
    model = make_model(Settings(), data, cpu)
    load_weights(model, str(tmp_path / "model.pt"))
    assert killing.same(dict(model.state_dict()), dict(begun.state_dict()))
    assert not capsys.readouterr().out
    other = make_model(Settings(), data._replace(class_names=["a", "b", "c"]), cpu)
    before = other.fc.weight.clone()
    load_weights(other, str(tmp_path / "model.pt"))
    assert torch.equal(other.fc.weight, before)
    assert torch.equal(other.stem.weight, begun.stem.weight)
    assert "the last layer is new" in capsys.readouterr().out
    (tmp_path / "list.pt").write_bytes(b"[]")
    for name, settings in (("model.pt", Settings(norm="group")), ("list.pt", Settings())):
        with pytest.raises(UserError, match="does not fit this model"):
            load_weights(make_model(settings, data, cpu), str(tmp_path / name))


# ---------------------------------------------------------------------------------------------- load_batches


class Draws(Dataset):
    """Draws from all three generators, and rounds a large sum."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        drawn = torch.rand(50_001)
        return index, random.random(), np.random.rand(), drawn.sum(), drawn[0]


class Several(Draws):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        raise AssertionError("its batches differ between ranks")


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10**9))


class Broken(Draws):
    def __getitem__(self, index: int) -> Any:
        raise UserError(f"image {index}\nis broken")


def progress(epoch: int = 1) -> SimpleNamespace:
    settings = SimpleNamespace(seed=3)
    session = SimpleNamespace(settings=settings)
    return SimpleNamespace(session=session, epoch=epoch, left=lambda b: b, remaining=iter)


def batches(dataset: Dataset, indices: Any = None, epoch: int = 1, **options: Any) -> list[Any]:
    if indices is None:
        indices = torch.arange(24).split(5)
    loaded = load_batches(progress(epoch), dataset, indices, **options)
    return [[part.tolist() for part in content] for _, content in loaded]


def set_worker_seed(worker: int) -> None:
    torch.manual_seed(worker)
    random.seed(worker)


@pytest.fixture(scope="module")
def drawn() -> list[Any]:
    return batches(Draws())


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1, "timeout": 60},
        {"num_workers": 2, "prefetch_factor": 5, "persistent_workers": True},
        {"num_workers": 2, "worker_init_fn": set_worker_seed},
        {"pin_memory": torch.cuda.is_available()},
    ],
)
def test_options_change_no_bit(options, drawn):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    try:
        assert batches(Draws(), **options) == drawn
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == before
    assert batches(Draws(), epoch=2) != drawn


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_kinds_of_indices(kind, drawn):
    indices = [kind(batch.tolist()) for batch in torch.arange(24).split(5)]
    assert batches(Draws(), indices) == drawn


def test_kinds_of_datasets(drawn):
    assert batches(Several()) == drawn
    subset = batches(Subset(Draws(), range(24)), num_workers=1)
    assert subset == drawn
    with pytest.raises(TypeError, match="'Endless' has no len"):
        batches(Endless())


def test_ranks_draw_what_one_process_draws(drawn, monkeypatch):
    expected = [[part[1::2] for part in batch] for batch in drawn]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert batches(Draws()) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_user_error_of_a_dataset_keeps_its_text(workers):
    with pytest.raises(UserError) as raised:
        list(iterate(DataLoader(Broken(), num_workers=workers)))
    assert str(raised.value) == "image 0\nis broken"


GROUP = """
import signal, sys
import torch.multiprocessing
from torch.utils.data import DataLoader, TensorDataset
from harness.loading import iterate
from harness.system import STOP_SIGNALS
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    signals = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))
    print("begun", flush=True)
    for epoch in range(2):
        print([int(number) for number, in iterate(DataLoader(TensorDataset(torch.arange(5)), num_workers=1))], flush=True)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # what comes while Python ends would kill it
    print("done", {*signals} == {*STOP_SIGNALS}, flush=True)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_start_in_spite_of_signals(method, tmp_path):
    """Of Python's ways to start a process, the last is its default from 3.14 on."""
    (tmp_path / "group.py").write_text(GROUP)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "group.py", method],
        env={**clean_environment(tmp_path), "PYTHONPATH": str(killing.REPO)},
        stdout=(tmp_path / "out").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    out = tmp_path / "out"
    while process.poll() is None and not out.read_text():
        time.sleep(0.02)
    while process.poll() is None and "done" not in out.read_text():
        for number in STOP_SIGNALS:
            os.killpg(process.pid, number)
        time.sleep(0.02)
    assert process.wait(timeout=100) == 0
    assert out.read_text() == "begun\n[0, 1, 2, 3, 4]\n[0, 1, 2, 3, 4]\ndone True\n"


FOREVER = """
import os, sys, time
from pathlib import Path
from torch.utils.data import DataLoader
from harness.loading import iterate

class Slow(list):
    def __getitem__(self, index):
        Path(f"{os.getpid()}.worker").touch()
        return index

def note(worker):
    Path(f"{os.getpid()}.begun").touch()

if __name__ == "__main__":
    loader = DataLoader(Slow(range(4)), num_workers=2, multiprocessing_context=sys.argv[1], worker_init_fn=note)
    for _ in iterate(loader):
        time.sleep(100)
"""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    command = Path(f"/proc/{pid}/cmdline")
    return command.exists() and bool(command.read_bytes())


def test_workers_end_with_a_killed_run(tmp_path):
    """Before, those of a fork server, Python's default from 3.14 on, stayed for good."""
    (tmp_path / "forever.py").write_text(FOREVER)
    command = [sys.executable, "forever.py", "forkserver"]
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(killing.REPO)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("*.worker"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [int(path.stem) for path in tmp_path.glob("*.begun")]
    process.kill()
    process.wait()
    assert len(workers) == 2
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers go on"
        time.sleep(0.02)
