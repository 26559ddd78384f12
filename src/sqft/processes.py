"""The processes of one command, as `torchrun` or `accelerate launch` starts them, and what they give each other.

In training they share the rows of each step; in compressing the calibration samples, whose sums are added up, and the
linears of each block. The first does all other work, and it alone writes. What fails in one ends all, with one message:
`torchrun` stops the others, and a process that waits for one that has ended raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from sqft.errors import ProcessLostError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Tensors = tuple["torch.Tensor", ...]

_DTYPES = ("uint8", "int8", "bool", "int64", "bfloat16", "float16", "float32", "float64")
_MOST = 8  # tensors that are sent together

# How long a process waits for the others: the first merges a teacher, or hashes a large model, while they do nothing.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """Return how many processes share this command; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return 0 if count() == 1 else int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Return whether this process is the one that writes."""
    return rank() == 0


def record() -> dict[str, int]:
    """Return what the manifest of shared work says of it: sums over several processes are rounded otherwise."""
    return {} if count() == 1 else {"processes": count()}


def barrier() -> None:
    """Wait until every process has called this; the first call sets this process's device, one GPU each.

    Raises:
        ProcessLostError: one of the others has ended.
    """
    if count() == 1:
        return
    import torch.distributed

    with _waiting():
        if not torch.distributed.is_initialized():
            from accelerate import PartialState

            on_cards = torch.cuda.is_available()
            # Without `cpu` accelerate makes no process group on a machine without a GPU.
            options = {"backend": "cuda:nccl,cpu:gloo"} if on_cards else {"cpu": True}
            PartialState(timeout=_PATIENCE, **options)
        torch.distributed.barrier()


def leave_group() -> None:
    """End the process group once the others are done: libraries that find one would wait for them."""
    if count() == 1:
        return
    import torch.distributed
    from accelerate import PartialState

    torch.distributed.destroy_process_group()
    PartialState._reset_state()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def once(work: Callable[[], object]) -> None:
    """Let the first process do something while the others wait."""
    if first():
        work()
    barrier()


def first_ahead(work: Callable[[], T]) -> T:
    """Return what `work` returns, called by the others once the first has: what it makes for all is then there."""
    if not first():
        barrier()
    result = work()
    if first():
        barrier()
    return result


def share(total: int) -> slice:
    """Return which of `total` things in a row are this process's; the shares differ by one at most."""
    return slice(*(total * number // count() for number in (rank(), rank() + 1)))


def add_up(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes, in place; the order of the sum is the library's.

    Raises:
        ProcessLostError: one of the others has ended.
    """
    if count() == 1:
        return
    import torch.distributed

    with _waiting():
        torch.distributed.all_reduce(tensor)


def each(
    works: Sequence[Callable[[], Tensors]], costs: Sequence[float], device: torch.device | str = "cpu"
) -> Iterator[Tensors]:
    """Yield what every piece of work returns, in order; one process does it and all get it.

    Without other processes a piece is done when its turn comes. Else each process does its own first, and keeps what
    it made until it is asked for.

    Args:
        works: the pieces; each returns tensors of one or two axes.
        costs: how long each takes, in any unit: the pieces are dealt so that all processes have about as much to do.
        device: of the tensors.

    Raises:
        ProcessLostError: one of the others has ended.
    """
    if count() == 1:
        yield from (work() for work in works)
        return
    owners = deal(costs, count())
    made = {index: works[index]() for index, owner in enumerate(owners) if owner == rank()}
    for index, owner in enumerate(owners):
        yield _send(made.pop(index, ()), owner, device)


def deal(costs: Sequence[float], processes: int) -> list[int]:
    """Return which process does each piece of work: the longest first, always to the one that has least to do."""
    owners, load = [0] * len(costs), [0.0] * processes
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


def _send(tensors: Tensors, owner: int, device: torch.device | str) -> Tensors:
    """Return the owner's tensors in every process."""
    import torch.distributed

    dtypes = [getattr(torch, name) for name in _DTYPES]
    header = torch.zeros(_MOST, 4, dtype=torch.int64)  # number of axes, dtype, shape
    for index, tensor in enumerate(tensors):
        header[index, : 2 + tensor.ndim] = torch.tensor([tensor.ndim, dtypes.index(tensor.dtype), *tensor.shape])
    sent = []
    with _waiting():
        torch.distributed.broadcast(header, src=owner)
        for index, (axes, dtype, *shape) in enumerate(row for row in header.tolist() if row[0]):
            if tensors:
                tensor = tensors[index].contiguous()
            else:
                tensor = torch.empty(shape[:axes], dtype=dtypes[dtype], device=device)
            # As bytes: no library sends all dtypes.
            torch.distributed.broadcast(tensor.view(torch.uint8), src=owner)
            sent.append(tensor)
    return tuple(sent)


def speaks() -> bool:
    """Return whether this process says what made it fail: of several that fail, the first alone."""
    if count() == 1:
        return True
    import torch.distributed
    from torch.distributed.distributed_c10d import _get_default_store

    if not torch.distributed.is_initialized():
        return first()
    try:
        return bool(_get_default_store().add("sqft/failed", 1) == 1)
    except RuntimeError:  # whoever kept the store has ended, and said why
        return False


@contextmanager
def _waiting() -> Iterator[None]:
    """Wait for the other processes.

    Raises:
        ProcessLostError: one of them has ended.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLostError(
            f"one of the {count()} processes has ended, killed or out of memory; what is finished stays, and the same "
            f"command goes on from it ({str(error).splitlines()[0]})"
        ) from error
