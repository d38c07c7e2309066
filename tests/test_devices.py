"""Devices that this machine lacks, as far as a CPU shows: which one is chosen, and errors of theirs in one line.

What torch answers about the hardware is replaced here; what runs on a GPU is in test_gpu.py.
"""

import pytest
import torch

import train_mnist
from harness import script
from harness.device import find_device
from harness.errors import UserError
from tests.conftest import REPO

pytestmark = pytest.mark.quick
QUICK = "--dataset synthetic --slice 100 --epochs 1 --wandb disabled --output_dir out".split()


@pytest.fixture
def apple(monkeypatch):
    torch.use_deterministic_algorithms(False)  # imports what could not be imported below
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_auto_leaves_out_mps(apple):
    """It was the choice on every Mac: most runs were not repeatable there, and torch 2.15 raises at max-pooling."""
    assert find_device("auto").type == "cpu"
    assert find_device("mps").type == "mps"


def test_mps_is_refused_where_a_run_should_repeat(apple, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--device mps .*: add --deterministic false"):
        train_mnist.main([*QUICK, "--device", "mps"])


def test_no_copy_outlives_its_source():
    """On mps, a copy that is not waited for reads memory that may be freed by then: wrong tokens, in silence."""
    sources = list(REPO.glob("*.py"))
    for folder in ("harness", "tasks", "examples"):
        sources += REPO.glob(f"{folder}/*.py")
    assert len(sources) > 30
    assert not [source for source in sources if "non_blocking=True" in source.read_text()]


@pytest.mark.parametrize(
    "message, works",
    [
        ("CUDA error: no kernel image is available for execution on the device", False),
        (
            "CUDA error: all CUDA-capable devices are busy or unavailable",
            True,
        ),  # not the CPU in silence
    ],
)
def test_a_gpu_that_this_torch_has_no_kernels_for(message, works, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", refuse)
    assert find_device("auto").type == ("cuda" if works else "cpu")
    if not works:
        with pytest.raises(UserError, match=r"--device cuda: not available .*, or in this torch"):
            find_device("cuda")


def raising(error: Exception):
    def action():
        raise error

    return action


def use_what_does_not_repeat() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "action, line",
    [
        (
            raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
            "out of memory: a smaller --micro_batch_size, or a smaller model, needs less",
        ),
        (
            use_what_does_not_repeat,
            "put_ does not have a deterministic implementation: --deterministic false allows it",
        ),
    ],
)  # fmt: skip
def test_errors_of_a_device_are_one_line(action, line, capsys):
    """They were tracebacks."""
    assert script.status_of(action) == 1
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.endswith(f"error: {line}")


def test_out_of_memory_while_restoring_is_not_another_version(tmp_path, monkeypatch, capsys):
    """The message was that the checkpoint is not of this model or version."""
    monkeypatch.chdir(tmp_path)
    train_mnist.main([*QUICK, "--max_steps", "2"])
    full = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(train_mnist.Best, "load_state_dict", lambda *_: raising(full)())
    resume = [*QUICK, "--max_steps", "4", "--resume"]
    assert script.status_of(lambda: train_mnist.main(resume)) == 1
    assert "error: out of memory: a smaller" in capsys.readouterr().err.splitlines()[-1]
