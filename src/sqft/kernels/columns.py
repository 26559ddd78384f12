"""A leaf of the column loop in one launch, in Triton: GPTQ's and SparseGPT's steps over neighbouring columns.

PyTorch launches seven kernels a column, and a launch takes longer than a column's work. Here a program holds a leaf of
some rows in registers and goes through its columns in order; rows are independent. The steps are those of
:meth:`sqft.core.columns.ColumnLoop._settle`, each rounded once; the mask is known before the leaf begins.

Shapes: O out features, I in features, L columns of a leaf, G groups.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from sqft.core.columns import ColumnLoop

LEAF = 32
"""Columns of a leaf at most."""
_ROWS, _WARPS = 32, 1
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2²³: x + it − it rounds half to even where |x| < 2²²


@triton.jit(do_not_specialize=["start"])
def _leaf_kernel(
    work_ptr, factor_ptr, order_ptr, kept_ptr, scale_ptr, low_ptr, high_ptr, value_ptr, rounded_ptr,
    start, O, factor_row, factor_column, group,  # noqa: E741
    COUNT: tl.constexpr, KEPT: tl.constexpr, GRID: tl.constexpr, L: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Settle columns start to start + COUNT of a tile of rows: values and errors are stored."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    k = tl.arange(0, L)
    there = o < O
    ok = (k < COUNT)[:, None] & there[None, :]
    rows = (start + k).to(tl.int64)
    at = work_ptr + rows[:, None] * O + o[None, :]
    tile = tl.load(at, mask=ok, other=0.0)
    for c in tl.range(0, COUNT):
        index = (start + c).to(tl.int64)
        weight = tl.sum(tl.where((k == c)[:, None], tile, 0.0), axis=0)  # one row of the tile
        column = tl.load(order_ptr + index).to(tl.int64)
        own = column * O + o
        if GRID:
            of_group = (column // group) * O + o
            scale = tl.load(scale_ptr + of_group, mask=there, other=1.0)
            low = tl.load(low_ptr + of_group, mask=there, other=0.0)
            high = tl.load(high_ptr + of_group, mask=there, other=0.0)
            position = tl.math.div_rn(weight, scale)
            tl.store(value_ptr + own, position, mask=there)
            # A step beyond the grid rounds to outside as any farther one does, and the rounding needs small numbers.
            near = tl.where(position < low - 1.0, low - 1.0, position)
            near = tl.where(near > high + 1.0, high + 1.0, near)
            settled = (near + _TO_INTEGER) - _TO_INTEGER
            settled = tl.where(settled < low, low, settled)
            settled = tl.where(settled > high, high, settled)
        else:
            settled = weight
        if KEPT:
            kept = tl.load(kept_ptr + own, mask=there, other=0)
            settled = tl.where(kept != 0, settled, 0.0)
        if GRID:
            tl.store(rounded_ptr + own, settled, mask=there)
            settled = settled * scale
        else:
            tl.store(value_ptr + own, settled, mask=there)
        factor = factor_ptr + index * factor_row
        error = tl.math.div_rn(weight - settled, tl.load(factor + index * factor_column))
        later = tl.load(factor + rows * factor_column, mask=(k > c) & (k < COUNT), other=0.0)
        tile = tl.where((k == c)[:, None], error[None, :], tile - later[:, None] * error[None, :])
    tl.store(at, tile, mask=ok)


def settle_leaf(loop: ColumnLoop, start: int, stop: int) -> None:
    """Settle the columns start to stop of a loop, at most :data:`LEAF`, as its own steps would, to rounding.

    Args:
        loop: its tensors are on CUDA, float32 and contiguous; its mask, if it has one, is chosen for these columns.
        start: first column, in the loop's order.
        stop: behind the last one.
    """
    work, factor, kept, rows = loop.work_IO, loop.factor, loop.kept_IO, loop.work_IO.shape[1]
    scale, low, high, rounded = (work,) * 4 if loop.grid_steps is None else loop.grid_steps
    with torch.cuda.device(work.device) if work.is_cuda else nullcontext():
        _leaf_kernel[(triton.cdiv(rows, _ROWS),)](
            work, factor, loop.order_I, work if kept is None else kept.view(torch.uint8), scale, low, high,
            loop.value_IO, rounded, start, rows, *factor.stride(), work.shape[0] // scale.shape[0], stop - start,
            kept is not None, loop.grid_steps is not None, LEAF, _ROWS, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
