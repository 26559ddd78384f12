"""GPTQ under a mask: quantise column by column, let the columns to come make up for each one's error, keep every zero.

    e_j = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e_j · U_jk   for k > j,   U the upper Cholesky factor of H⁻¹
                                                            (Frantar et al. 2022, algorithm 1; SQFT section 2.1)

Shapes: O out features, I in features, G groups, B a block of columns.

The error feedback moves pruned weights away from zero. Other tools quantise them where they land, which brings back a
tenth of the pruned weights, or set them to zero and forget what they had received. Here ŵ_j = 0 is simply the value
that a pruned weight must take: it gets the code z, and what it had received goes on, as an error, to the columns to
come. That is the exact step of the method under the constraint "this weight is zero" (the step SparseGPT takes).

Rows are independent, so linears that share an input are quantised as one tall weight: the column loop, whose cost is
its number of small operations, runs once for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sqft.core.grid import Grid
from sqft.core.pruners import inverse_cholesky


@dataclass(frozen=True)
class Quantized:
    """What quantising a weight leaves.

    Attributes:
        codes_OI: uint8.
        grid: scales and zero points.
        offset_OI: int8, where in its bin the compensated float weight was, just before rounding; see
            :meth:`sqft.core.grid.Grid.offsets`.
    """

    codes_OI: torch.Tensor
    grid: Grid
    offset_OI: torch.Tensor

    def split(self, sizes: list[int]) -> list[Quantized]:
        """Return the parts of a tall weight, by their rows."""
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            parts.append(Quantized(self.codes_OI[rows], self.grid.rows(rows), self.offset_OI[rows]))
            start += size
        return parts


def round_to_nearest(
    weight_OI: torch.Tensor, *, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> Quantized:
    """Quantise without calibration; zeros stay zeros because the grid contains them.

    Args:
        weight_OI: [O, I], any float dtype.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is the whole row.
        symmetric: see :meth:`Grid.fit`.
        dtype: what the scales are stored in.
    """
    grid = Grid.fit(weight_OI, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    codes = grid.quantize(weight_OI)
    return Quantized(codes, grid, grid.offsets(weight_OI, codes))


def gptq(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    mask_OI: torch.Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
) -> Quantized:
    """Quantise a weight with error feedback; see the module.

    Args:
        weight_OI: [O, I], any float dtype.
        hessian_II: sum or mean of x xᵀ over calibration tokens, float32 [I, I]; its scale does not matter.
        mask_OI: bool, True = kept; None is unmasked.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is the whole row.
        symmetric: see :meth:`Grid.fit`.
        dtype: what the scales are stored in.
        act_order: take columns by falling activity (the hessian's diagonal). Grids are then those of the given
            weight, so groups stay contiguous columns and no index of columns is stored. Without it a group's grid is
            made when the loop reaches the group, from the weights as compensated so far.
        damping: added to the hessian's diagonal, as a fraction of its mean.
        block: columns between updates of the whole rest.

    Returns:
        Codes, grid and offsets; every masked weight has exactly the zero point's code.

    Raises:
        NumericalError: the damped hessian is not positive definite, or a value is not finite.
        InputError: the group size does not divide the row.
    """
    weight = weight_OI.float()
    kept_IO = None if mask_OI is None else mask_OI.T.contiguous()
    if mask_OI is not None:
        weight = weight * mask_OI
    columns = weight.shape[1]
    grid = Grid.fit(weight, bits=bits, group_size=group_size, symmetric=symmetric, dtype=dtype)
    group = grid.group_size
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian_II.diagonal().argsort(descending=True, stable=True)
        hessian_II = hessian_II[order][:, order]
    factor = inverse_cholesky(hessian_II, damping)
    # Columns are rows here, so that each is contiguous.
    work_IO = weight.T[order].contiguous()
    scale, low, high = (part.squeeze(-1).T.contiguous() for part in grid.steps())
    position_IO = torch.empty_like(work_IO)
    rounded_IO = torch.empty_like(work_IO)
    columns_in_order = order.tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(work_IO[start:stop])
        for index in range(start, stop):
            column = columns_in_order[index]
            g = column // group
            if not act_order and column % group == 0:
                _refit(grid, g, _pending(work_IO, errors, factor, start, index, group), kept_IO, (scale, low, high))
            position = torch.div(work_IO[index], scale[g], out=position_IO[column])
            rounded = torch.round(position, out=rounded_IO[column])
            torch.minimum(torch.maximum(rounded, low[g], out=rounded), high[g], out=rounded)
            if kept_IO is not None:
                rounded.mul_(kept_IO[column])
            error = torch.addcmul(work_IO[index], rounded, scale[g], value=-1).div_(factor[index, index])
            errors[index - start] = error
            if index + 1 < stop:
                work_IO[index + 1 : stop].addr_(factor[index, index + 1 : stop], error, alpha=-1)
        if stop < columns:
            work_IO[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    if kept_IO is not None:
        position_IO.mul_(kept_IO)
    zero_IO = (-low).repeat_interleave(group, dim=0)
    codes = (rounded_IO + zero_IO).to(torch.uint8).T.contiguous()
    offset = (position_IO - rounded_IO).mul_(256).round_().clamp_(-127, 127).to(torch.int8).T.contiguous()
    if not act_order:
        grid = Grid(scale.T.contiguous().to(dtype), (-low).T.contiguous().to(torch.uint8), bits, columns, symmetric)
    return Quantized(codes, grid, offset)


def _pending(
    work_IO: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, start: int, index: int, group: int
) -> torch.Tensor:
    """Return a group's columns as compensated so far, also where it reaches beyond the block being worked on."""
    stop = start + errors.shape[0]
    columns = work_IO[index : index + group].clone()
    if index + group > stop and index > start:
        columns[stop - index :].addmm_(factor[start:index, stop : index + group].T, errors[: index - start], alpha=-1)
    return columns


def _refit(
    grid: Grid,
    g: int,
    columns_BO: torch.Tensor,
    kept_IO: torch.Tensor | None,
    units: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Replace group g's scale and bounds by those of its weights as compensated so far."""
    group = columns_BO.shape[0]
    if kept_IO is not None:
        columns_BO = columns_BO * kept_IO[g * group : (g + 1) * group]
    fitted = Grid.fit(
        columns_BO.T, bits=grid.bits, group_size=None, symmetric=grid.symmetric, dtype=grid.scale_OG.dtype
    )
    for target, value in zip(units, fitted.steps(), strict=True):
        target[g] = value.flatten()
