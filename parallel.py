"""Several processes, started by torchrun, that train one model together; without torchrun, one that is the first.

Each holds all data and the whole model and takes its share of every batch; adding up the gradients keeps the models the
same. What is done once (files, W&B, messages) is done by the first.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from options import Stopped, UserError


def rank() -> int:
    """Which of the processes this is; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, where torchrun or another launcher that sets its variables has started several."""
    told = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if not told or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    # Each attempt of torchrun (--max-restarts) for itself: the store may still say where dead processes listened.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    if rank() == 0:
        print(f"{world_size()} processes train together.")
    yield
    dist.destroy_process_group()  # after an error the end of the process does, when all has been said


@contextlib.contextmanager
def after_the_first() -> Iterator[None]:
    """For the other processes: where all of them end early in the block, they wait for the first and say nothing.

    torchrun ends all processes as soon as one has failed, and the first is to say why.
    """
    try:
        yield
    except (Stopped, UserError):
        with contextlib.suppress(Stopped):
            from_the_first()  # ends when the first process does
        raise Stopped("the first process", 0) from None


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    """Raises `Stopped` in place of what gloo or NCCL raise, mostly as another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2][:80]
        raise Stopped(f"a failed exchange between processes ({reason})", 1) from error


def add_up(*tensors: Tensor) -> None:
    """Replace float tensors, all on one device, by their sums over the processes; all get the same bits."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # once is much faster than one by one
    with _exchanging():
        dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def any_of_them(asked: bool) -> bool:
    """Whether `asked` is true in any of the processes; does not wait for an accelerator."""
    votes = torch.tensor(float(asked))
    add_up(votes)
    return bool(votes)


def from_the_first(thing: Any = None) -> Any:
    """What the first process passes, in all of them; the others wait for it."""
    if world_size() == 1:
        return thing
    things = [thing]
    with _exchanging():
        dist.broadcast_object_list(things, src=0, device=torch.device("cpu"))
    return things[0]


def gathered(thing: Any) -> list[Any]:
    """What each process passes, in order."""
    if world_size() == 1:
        return [thing]
    things = [None] * world_size()
    with _exchanging():
        dist.all_gather_object(things, thing)
    return things


def check_shares(examples: int, batch_size: int) -> None:
    """Raises `UserError` where a batch of an epoch has fewer examples than there are processes."""
    smallest = examples % batch_size or batch_size
    if smallest < world_size():
        raise UserError(
            f"{world_size()} processes can't share the last batch of an epoch, which has {smallest} of the {examples} "
            "examples: take another --batch_size, or fewer processes"
        )


def check_same(*checksums: int) -> None:
    """Raises `UserError`, in all processes, where they do not have the same data and model."""
    if len(set(gathered(checksums))) > 1:
        raise UserError("the processes do not have the same data and model: give all of them the same files")
