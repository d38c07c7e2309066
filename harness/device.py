"""Where a run computes and how it repeats itself: device, precision, random numbers."""

import contextlib
import ctypes
import logging
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from harness import distributed
from harness.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's names for its parameters


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch.

    If `deterministic`, allow only algorithms that repeat to the last bit.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every device
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
        torch.backends.cudnn.benchmark = False
    # A debugging aid that costs a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    # In float32, convolutions use TF32 by default, unlike the exported model.
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def restoring_globals() -> Iterator[None]:
    """Restore the process-wide settings that a run changes: a notebook's kernel outlives it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    attributes = [
        (torch.utils.deterministic, "fill_uninitialized_memory"),
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (logging, "raiseExceptions"),
    ]
    values = [getattr(owner, name) for owner, name in attributes]
    try:
        yield
    finally:
        for (owner, name), value in zip(attributes, values):
            setattr(owner, name, value)
        with contextlib.suppress(Exception):  # a signal may interrupt torch's own imports
            torch.use_deterministic_algorithms(deterministic)


def seed_rank(seed: int) -> None:
    """Seed torch differently on each rank, so that dropout differs.

    Call it once the model has its weights.
    """
    torch.manual_seed(seed + distributed.rank())


def shuffled(examples: int, seed: int, epoch: int) -> Tensor:
    """Indices in random order, int64 (examples,).

    From seed and epoch alone, so that a resumed run repeats them.
    """
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(examples))


def keep_freed_memory() -> None:
    """Have glibc keep freed memory.

    Returning it after every batch takes a fifth of a small batch's time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)


def find_device(name: str) -> torch.device:
    """The device for `--device`; under torchrun, a GPU per process.

    "auto" is "cuda" or "cpu": on "mps", a run does not repeat to the last bit. Raises `UserError`.
    """
    alone = distributed.world_size() == 1
    has_cuda = name in ("auto", "cuda") and torch.cuda.is_available()
    if has_cuda and alone:  # several processes would all use memory of the first GPU
        has_cuda = _runs_kernels()
    has_mps = alone and torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if (name == "cuda" and not has_cuda) or (name == "mps" and not has_mps):
        raise UserError(
            f"--device {name}: not available on this machine, or in this torch: use --device cpu"
        )
    if name != "cuda" or alone:
        return torch.device(name)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes on a machine with {gpus} GPUs: "
            f"start {gpus}, or use --device cpu"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name, torch.cuda.current_device())


def _runs_kernels() -> bool:
    """Whether this build of torch has kernels for the GPU; if not, torch itself warns."""
    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        return "no kernel image" not in str(error)
    return True


def find_precision(name: str, device: torch.device) -> str:
    """The precision for `--precision`: "fp32" or "bf16".

    "auto" is bf16 if the hardware has instructions for it.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in torch 2.9
        native = device.type == "cpu" and capabilities.get("avx512_bf16", False)
    return "bf16" if native else "fp32"
