"""The processes of one command, as `torchrun` or `accelerate launch` starts them, and what they give each other.

In training they share the rows of each step; in compressing the calibration samples, whose sums are added up, and the
rows of each weight. The first does all other work, and it alone writes. What fails in one ends all, with one message:
`torchrun` stops the others, and a process that waits for one that has ended raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from sqft.errors import ProcessLostError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

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


def by_rows(
    rows: int, work: Callable[[slice], tuple[torch.Tensor, ...]], *, apart: bool = True
) -> tuple[torch.Tensor, ...]:
    """Return what `work` makes of all rows, each process having done its share of them.

    Args:
        rows: how many there are.
        work: given a stretch of rows; returns tensors that have a row for each.
        apart: whether what is made of a row depends on no other; if not, all get what the first made of the whole.

    Raises:
        ProcessLostError: one of the others has ended.
    """
    if count() == 1:
        return work(slice(0, rows))
    import torch.distributed

    sharing = min(rows, count()) if apart else 1
    parts = [slice(rows * i // sharing, rows * (i + 1) // sharing) for i in range(sharing)]
    # One that is left without rows does some that are not its own, to know what comes.
    own = parts[min(rank(), sharing - 1)]
    found = []
    for part in work(own):
        whole = part.new_empty((rows, *part.shape[1:]))
        whole[own] = part
        with _waiting():
            for owner, stretch in enumerate(parts):
                # As bytes: no library sends all dtypes.
                torch.distributed.broadcast(whole[stretch].view(torch.uint8), src=owner)
        found.append(whole)
    return tuple(found)


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
