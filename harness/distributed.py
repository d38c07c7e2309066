"""Data-parallel training under torchrun; without torchrun, a single process of rank 0.

Every rank holds all the data and the whole model, and computes a share of each batch. Summing the
gradients keeps the models identical. Rank 0 alone writes files, logs to W&B and prints.
"""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.errors import Stopped, UserError

Items = TypeVar("Items", bound=Sequence | Tensor)


def rank() -> int:
    """The rank of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def spans_hosts() -> bool:
    """Whether torchrun started processes on several hosts."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") not in ("", "1")


@contextlib.contextmanager
def joined(timeout: float, last_wait: float) -> Iterator[None]:
    """Join the other processes, if torchrun or a launcher with the same variables started some.

    A process waits `timeout` seconds for the others, and at the end `last_wait` more for rank 0 to
    finish. Raises `UserError` for impossible variables, and `Stopped` if the others do not answer.
    """
    launched = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if not launched or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    _check_environment()
    limit = timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # After a restart by torchrun, the store still holds the addresses of dead processes.
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    with _communicating():
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(attempt, store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
        end = dist.new_group(backend="gloo", timeout=limit + timedelta(seconds=last_wait))
    if rank() == 0:
        print(f"{world_size()} processes train together.")
    yield
    with _communicating():
        dist.barrier(end)  # torchrun would not restart a process that exits before rank 0 fails
    dist.destroy_process_group()  # not after an error: the other ranks may have to report theirs


def _check_environment() -> None:
    """Raise `UserError` for variables with which the processes would wait forever."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    number, count, address, port = (os.environ[name] for name in names)
    try:
        socket.getaddrinfo(address, int(port))
        if not 0 <= int(number) < int(count) or int(port) >= 2**16:
            raise ValueError("impossible")
    except (OSError, ValueError) as error:  # UnicodeError is a ValueError
        given = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise UserError(f"{given}: {error}; start with torchrun, or unset them") from None


@contextlib.contextmanager
def deferring_to_rank_0() -> Iterator[None]:
    """On the other ranks, let rank 0 report an error first: torchrun kills all once one has failed.

    Then raise the error again in the first process of a host, which reports it there, and
    `Stopped` in the others.
    """
    try:
        yield
    except (Stopped, UserError) as error:
        if isinstance(error, UserError) and error.of_this_rank:
            raise
        with contextlib.suppress(Stopped):
            broadcast()  # returns when rank 0 exits
        if os.environ.get("LOCAL_RANK") == "0":
            raise
        raise Stopped("rank 0", error.status) from None


def stop_launcher() -> None:
    """End torchrun on this host: it would restart its processes, or wait for other hosts."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun passes it on to its processes
        os.kill(os.getppid(), signal.SIGTERM)


@contextlib.contextmanager
def _communicating() -> Iterator[None]:
    """Turn errors of gloo and NCCL into `Stopped`: another process is gone or does not answer."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        reason = first_line.rpartition("] ")[2].partition(". ")[0][:80]
        silent = bool(re.search("timed? ?out", reason, re.IGNORECASE))
        if silent:
            reason += "; --peer_timeout is the limit"
        # While a host is silent, a restart is no help, and torchrun would wait for 15 minutes.
        reason = f"a communication failure between processes ({reason})"
        raise Stopped(reason, 1, ends_launcher=silent and spans_hosts()) from error


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which then find what it has downloaded."""
    if rank() == 0:
        yield
        broadcast()
        return
    broadcast()
    try:
        yield
    except UserError as error:
        error.of_this_rank = True
        raise


def share_of(items: Items) -> Items:
    """This rank's share of a batch, or of a list of batches: every `world_size`-th item."""
    return items[rank() :: world_size()]


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace float tensors, all on one device, by their sums over all ranks.

    The sums are identical to the last bit on all ranks.
    """
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # faster than many all-reduces
    with _communicating():
        dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, flat.split(sizes)):
        tensor.copy_(total.view_as(tensor))


def sum_gradients(model: nn.Module) -> None:
    """Replace the model's gradients by their sums over all ranks, once before each optimizer step.

    Raises `ValueError` if they hold gradients that were summed before.
    """
    if world_size() == 1:
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if any(hasattr(weight.grad, "is_summed") for weight in weights):
        raise ValueError(
            "sum_gradients would sum some gradients twice: "
            "call it only before optimizer.step(), and optimizer.zero_grad() after that"
        )
    # A rank may lack gradients that others have: its share of the batch did not need the weight.
    has = torch.tensor([w.grad is not None for w in weights]).to(weights[0])
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    sum_over_ranks(has, *gradients)
    for weight, gradient, ranks in zip(weights, gradients, has):
        if weight.grad is not None or ranks > 0:
            weight.grad = gradient
            gradient.is_summed = True


def check_gradients(weights: Iterable[Tensor]) -> None:
    """Raise `ValueError` if there are several ranks, and gradients of this rank alone."""
    if world_size() == 1:
        return
    for weight in weights:
        if weight.grad is not None and not hasattr(weight.grad, "is_summed"):
            raise ValueError(
                "call distributed.sum_gradients(model) before optimizer.step(), "
                "and change gradients in place after it"
            )


def broadcast(value: Any = None) -> Any:
    """Rank 0's `value`, on every rank; the others wait for it."""
    values = [value]
    if world_size() > 1:
        with _communicating():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gather(value: Any) -> list[Any]:
    """The `value` of each rank, in order. Does not synchronize with an accelerator."""
    values = [value] * world_size()
    if world_size() > 1:
        with _communicating():
            dist.all_gather_object(values, value)
    return values
