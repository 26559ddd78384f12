"""The processes of one training, as `torchrun` or `accelerate launch` starts them; the first does all other work."""

from __future__ import annotations

import os
from datetime import timedelta

# How long a process waits for the others: the first prunes and quantises the base before it trains on it.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """Return how many processes share this training; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Return whether this process is the one that writes."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


def barrier() -> None:
    """Wait until every process has called this; the first call sets this process's device, one GPU each."""
    if count() == 1:
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        # Without `cpu` accelerate makes no process group on a machine without a GPU.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
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
