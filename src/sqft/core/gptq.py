"""GPTQ under a mask: quantise column by column, let the columns to come make up for each one's error, keep every zero.

    e_j = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e_j · U_jk   for k > j,   U the upper Cholesky factor of H⁻¹
                                                            (Frantar et al. 2022, algorithm 1; SQFT section 2.1)

Shapes: O out features, I in features, G groups, B columns of a group.

The error feedback moves pruned weights away from zero. Other tools quantise them where they land, which brings back a
tenth of the pruned weights, or set them to zero and forget what they had received. Here ŵ_j = 0 is simply the value
that a pruned weight must take: it gets the code z, and what it had received goes on, as an error, to the columns to
come. That is the exact step of the method under the constraint "this weight is zero" (the step SparseGPT takes).

Columns are taken in recursive halves: when the first half is done, its errors go to the second half in one matrix
product. Rows are independent, so linears that share an input are quantised as one tall weight: the column loop, whose
cost is its number of small operations, runs once for them. For the same reason a very tall weight goes in stretches of
rows, so that the float32 copies that the loop needs stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sqft.core.grid import Grid, stretches
from sqft.core.statistics import inverse_cholesky

_LEAF = 8  # columns updated one by one; so few that an update stays in cache and on one thread


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

    @classmethod
    def join(cls, parts: list[Quantized]) -> Quantized:
        """Return the tall weight whose parts they are, in order."""
        first = parts[0].grid
        scale, zero = (torch.cat([getattr(part.grid, name) for part in parts]) for name in ("scale_OG", "zero_OG"))
        grid = Grid(scale, zero, first.bits, first.columns, first.symmetric)
        return cls(torch.cat([p.codes_OI for p in parts]), grid, torch.cat([p.offset_OI for p in parts]))


def round_to_nearest(
    weight_OI: torch.Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    least_zero: int = 0,
) -> Quantized:
    """Quantise without calibration; zeros stay zeros because the grid contains them.

    Args:
        weight_OI: [O, I], any float dtype.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is the whole row.
        symmetric: see :meth:`Grid.fit`.
        dtype: what the scales are stored in.
        least_zero: see :meth:`Grid.fit`.
    """
    fit = partial(Grid.fit, bits=bits, symmetric=symmetric, dtype=dtype, least_zero=least_zero)
    parts = []
    for rows in stretches(weight_OI):
        weight = weight_OI[rows]
        grid = fit(weight, group_size=group_size)
        codes = grid.quantize(weight)
        parts.append(Quantized(codes, grid, grid.offsets(weight, codes)))
    return Quantized.join(parts)


def gptq(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    mask_OI: torch.Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    least_zero: int = 0,
    act_order: bool = True,
    damping: float = 0.01,
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
        least_zero: see :meth:`Grid.fit`.
        act_order: take columns by falling activity (the hessian's diagonal). Grids are then those of the given
            weight, so groups stay contiguous columns and no index of columns is stored. Without it a group's grid is
            made when the loop reaches the group, from the weights as compensated so far.
        damping: added to the hessian's diagonal, as a fraction of its mean.

    Returns:
        Codes, grid and offsets; every masked weight has exactly the zero point's code.

    Raises:
        NumericalError: the damped hessian is not positive definite, or it or the weight is not finite.
        InputError: the group size does not divide the row.
    """
    fit = partial(Grid.fit, bits=bits, symmetric=symmetric, dtype=dtype, least_zero=least_zero)
    columns = weight_OI.shape[1]
    order = torch.arange(columns, device=weight_OI.device)
    if act_order:
        order = hessian_II.diagonal().argsort(descending=True, stable=True)
    factor_II = inverse_cholesky(hessian_II, damping, order if act_order else None)
    parts = []
    for rows in stretches(weight_OI):
        weight, mask = weight_OI[rows].float(), None if mask_OI is None else mask_OI[rows]
        if mask is not None:
            weight = weight * mask
        loop = _ColumnLoop(
            factor_II=factor_II,
            work_IO=weight.T[order].contiguous(),
            kept_IO=None if mask is None else mask.T.contiguous(),
            order=order.tolist(),
            grid=fit(weight, group_size=group_size),
            refit=None if act_order else fit,
        )
        loop.run(0, columns)
        parts.append(loop.result())
    return Quantized.join(parts)


class _ColumnLoop:
    """The state of one run; columns of the weight are rows here, so that each is contiguous.

    Attributes:
        work_IO: weights yet to come, compensated so far, in the loop's order; of columns that are done, their errors.
        position_IO: each weight just before rounding, in steps of the grid, in the weight's own order of columns.
        rounded_IO: q − z.
    """

    def __init__(
        self,
        factor_II: torch.Tensor,
        work_IO: torch.Tensor,
        kept_IO: torch.Tensor | None,
        order: list[int],
        grid: Grid,
        *,
        refit: Callable[..., Grid] | None,
    ) -> None:
        self.factor, self.work_IO, self.kept_IO, self.order = factor_II, work_IO, kept_IO, order
        self.grid, self.refit = grid, refit
        self.scale, self.low, self.high = (part.squeeze(-1).T.contiguous() for part in grid.steps())
        self.position_IO, self.rounded_IO = torch.empty_like(work_IO), torch.empty_like(work_IO)

    def run(self, start: int, stop: int) -> None:
        """Quantise columns start to stop, which have received all errors of the columns before them.

        Halving turns all but the last updates into matrix products; a split falls between groups while it can, so
        that a group is whole, and fully compensated, when its grid is made.
        """
        group = self.grid.group_size
        if self.refit is not None and start % group == 0 and stop - start == group:
            self._fit_group(start, self.refit)
        if stop - start <= min(_LEAF, group):
            self._columns(start, stop)
            return
        half = (stop - start) // 2
        middle = start + (half if stop - start <= group else max(group, half // group * group))
        self.run(start, middle)
        self.work_IO[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.work_IO[start:middle], alpha=-1)
        self.run(middle, stop)

    def _columns(self, start: int, stop: int) -> None:
        for index in range(start, stop):
            weight, column = self.work_IO[index], self.order[index]
            g = column // self.grid.group_size
            position = torch.div(weight, self.scale[g], out=self.position_IO[column])
            rounded = torch.round(position, out=self.rounded_IO[column])
            rounded.clamp_(self.low[g], self.high[g])
            if self.kept_IO is not None:
                rounded.mul_(self.kept_IO[column])
            # From here on the row holds the error.
            weight.addcmul_(rounded, self.scale[g], value=-1).div_(self.factor[index, index])
            if index + 1 < stop:
                self.work_IO[index + 1 : stop].addr_(self.factor[index, index + 1 : stop], weight, alpha=-1)

    def _fit_group(self, start: int, refit: Callable[..., Grid]) -> None:
        """Replace a group's scale and bounds by those of its weights as compensated so far."""
        group = self.grid.group_size
        weight_BO = self.work_IO[start : start + group]
        if self.kept_IO is not None:
            weight_BO = weight_BO * self.kept_IO[start : start + group]
        fitted = refit(weight_BO.T, group_size=None).steps()
        for target, value in zip((self.scale, self.low, self.high), fitted, strict=True):
            target[start // group] = value.flatten()

    def result(self) -> Quantized:
        grid = self.grid
        zero_IO = (-self.low).repeat_interleave(grid.group_size, dim=0)
        codes = (self.rounded_IO + zero_IO).to(torch.uint8).T.contiguous()
        offset = self.position_IO.sub_(self.rounded_IO).mul_(256).round_().clamp_(-127, 127)
        if self.kept_IO is not None:
            offset.mul_(self.kept_IO)
        if self.refit is not None:
            scale = self.scale.T.contiguous().to(grid.scale_OG.dtype)
            zero = (-self.low).T.contiguous().to(torch.uint8)
            grid = Grid(scale, zero, grid.bits, grid.columns, grid.symmetric)
        return Quantized(codes, grid, offset.to(torch.int8).T.contiguous())
