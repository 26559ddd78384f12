"""A leaf of the column loop on a CPU, in one call of compiled code; the kernel for CUDA is :mod:`sqft.kernels.columns`.

PyTorch takes seven small operations a column, each over one row of the transposed weight. Here a tile of rows goes
through the leaf's columns in the processor's first cache. Both kernels round each operation by itself.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from sqft.kernels import build

if TYPE_CHECKING:
    from sqft.core.columns import ColumnLoop

LEAF = 32
"""Columns of a leaf at most."""


class _Leaf(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "count", "rows")),
        *((name, ctypes.c_void_p) for name in ("work", "factor")),
        *((name, ctypes.c_int64) for name in ("factor_row", "factor_column")),
        *((name, ctypes.c_void_p) for name in ("order", "kept", "value", "scale", "low", "high", "rounded")),
        ("group", ctypes.c_int64),
    )


def available() -> bool:
    """Return whether the kernel runs on this machine; the first call may build it."""
    return KERNEL.library() is not None


def settle_leaf(loop: ColumnLoop, start: int, stop: int) -> None:
    """Settle the columns start to stop of a loop, at most :data:`LEAF`, as its own steps would, to rounding.

    Args:
        loop: its tensors are float32, on the CPU and contiguous; its mask, if it has one, is chosen for these columns.
        start: first column, in the loop's order.
        stop: behind the last one.
    """
    work, factor, rows = loop.work_IO, loop.factor, loop.work_IO.shape[1]
    grid = loop.grid_steps or (None,) * 4
    job = _Leaf(
        *(start, stop - start, rows, work.data_ptr(), factor.data_ptr(), *factor.stride()),
        *(None if part is None else part.data_ptr() for part in (loop.order_I, loop.kept_IO, loop.value_IO, *grid)),
        0 if grid[0] is None else work.shape[0] // grid[0].shape[0],
    )
    library = KERNEL.library()
    assert library is not None
    library.sqft_settle(ctypes.byref(job), torch.get_num_threads())


def _load() -> ctypes.CDLL | str:
    """Return the kernel, built if need be, or why there is none."""
    library = build.load("settle", "compressing", *build.ONE_BY_ONE, *build.VECTORS.get(build.processor(), ()))
    if not isinstance(library, str):
        library.sqft_settle.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


KERNEL = build.Kernel(_load, "columns are settled by PyTorch")
