"""The processes of one training, as `torchrun` or `accelerate launch` starts them; all else is the first one's work."""

from __future__ import annotations

import os
from datetime import timedelta

# How long a process waits for the others: the first prunes and quantises the base before it trains on it.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """Return how many processes share this training; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Tell whether this process is the one that writes."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


def meet() -> None:
    """Wait until every process has come here; the first call sets this process's device, one GPU each."""
    if count() == 1:
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        # Without `cpu` accelerate takes processes on a machine without a GPU for strangers to each other.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    torch.distributed.barrier()


def go_on_alone() -> None:
    """Leave the others, whose part is done: libraries that find a process group would wait for them."""
    if count() == 1:
        return
    import torch.distributed
    from accelerate import PartialState

    torch.distributed.destroy_process_group()
    PartialState._reset_state()
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
