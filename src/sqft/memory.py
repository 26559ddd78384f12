"""Memory of this process: its peak, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def release_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces under 32 MB, which most weights and activations are, for later allocations of the same
    size. Loading, running and pruning allocate other sizes, and the unused memory grew to twice what was in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def begin_peak() -> None:
    """Reset the kernel's peak memory, after freeing what earlier work left.

    Linux only, else a no-op: there the peak is that of the process.
    """
    gc.collect()
    release_memory()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process since :func:`begin_peak` (Linux) or since its start."""
    with suppress(OSError), open("/proc/self/status") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cuda() -> Any:
    """Return torch.cuda if this process computes on a card, without importing or initialising anything."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@contextmanager
def costing() -> Iterator[dict[str, Any]]:
    """Yield a dict that holds {seconds, peak_memory_bytes} of the block once it has ended.

    Where this process computes on a card also `peak_gpu_bytes`, the most that tensors took there; the card holds
    PyTorch's own few hundred megabytes besides.
    """
    found: dict[str, Any] = {}
    started = time.monotonic()
    begin_peak()
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    yield found
    found.update(seconds=round(time.monotonic() - started, 2), peak_memory_bytes=peak_memory_bytes())
    if (cuda := _cuda()) is not None:
        found["peak_gpu_bytes"] = int(cuda.max_memory_allocated())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out; the CPU's allocator says so in its text alone."""
    said = "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)
