"""GPTQ under a mask: quantise column by column, let the columns to come make up for each one's error, keep every zero.

Shapes: O out features, I in features, G groups, B columns of a group.

The error feedback (:mod:`sqft.core.columns`) moves pruned weights away from zero. Other tools quantise them where they
land, which brings back a tenth of the pruned weights, or set them to zero and forget what they had received. Here
ŵ_j = 0 is simply the value that a pruned weight must take: it gets the code z, and what it had received goes on, as an
error, to the columns to come. That is the exact step of the method under the constraint "this weight is zero" (the step
SparseGPT takes).

With `update` the loop is given the weight as it was before pruning, so the whole of a pruned weight goes on as an error
too: pruning is made up for by the same step as rounding. A very tall weight goes in stretches of rows, so that the
float32 copies that the loop needs stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sqft.core.columns import Choice, ColumnLoop, Pattern
from sqft.core.grid import Grid, stretches
from sqft.core.statistics import inverse_cholesky


@dataclass(frozen=True)
class Quantized:
    """What quantising a weight leaves.

    Attributes:
        codes_OI: uint8.
        grid: scales and zero points.
        offset_OI: int8, where in its bin the compensated float weight was, just before rounding; see
            :meth:`sqft.core.grid.Grid.offsets`.
        mask_OI: bool, True = kept; None is unmasked.
    """

    codes_OI: torch.Tensor
    grid: Grid
    offset_OI: torch.Tensor
    mask_OI: torch.Tensor | None = None

    def split(self, sizes: list[int]) -> list[Quantized]:
        """Return the parts of a tall weight, by their rows."""
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            mask = None if self.mask_OI is None else self.mask_OI[rows]
            parts.append(Quantized(self.codes_OI[rows], self.grid.rows(rows), self.offset_OI[rows], mask))
            start += size
        return parts

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it consists of, a row for each row of the weight; :meth:`of` takes it."""
        found = (self.codes_OI, self.grid.scale_OG, self.grid.zero_OG, self.offset_OI)
        return found if self.mask_OI is None else (*found, self.mask_OI)

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor, ...], *, bits: int, symmetric: bool) -> Quantized:
        """Undo :attr:`tensors`."""
        codes_OI, scale_OG, zero_OG, offset_OI, *mask = tensors
        grid = Grid(scale_OG, zero_OG, bits, codes_OI.shape[1], symmetric)
        return cls(codes_OI, grid, offset_OI, mask[0] if mask else None)

    @classmethod
    def join(cls, parts: list[Quantized]) -> Quantized:
        """Return the tall weight whose parts they are, in order."""
        joined = tuple(torch.cat(values) for values in zip(*(part.tensors for part in parts), strict=True))
        return cls.of(joined, bits=parts[0].grid.bits, symmetric=parts[0].grid.symmetric)


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
    update: bool = False,
    pattern: Pattern | None = None,
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
        update: the weight comes unpruned, and the weights that stay make up for what is pruned. Columns then keep
            their order whatever `act_order` says: that loses a seventh less (docs/decisions.md).
        pattern: choose the mask in the loop, by SparseGPT's criterion, among what `mask_OI` keeps; implies `update`.

    Returns:
        Codes, grid, offsets and mask; every masked weight has exactly the zero point's code.

    Raises:
        NumericalError: the damped hessian is not positive definite, or it or the weight is not finite.
        InputError: the group size does not divide the row.
    """
    fit = partial(Grid.fit, bits=bits, symmetric=symmetric, dtype=dtype, least_zero=least_zero)
    columns = weight_OI.shape[1]
    update = update or pattern is not None
    order = torch.arange(columns, device=weight_OI.device)
    act_order = act_order and not update
    if act_order:
        order = hessian_II.diagonal().argsort(descending=True, stable=True)
    factor_II = inverse_cholesky(hessian_II, damping, order if act_order else None)
    parts = []
    for rows in stretches(weight_OI):
        weight, mask = weight_OI[rows].float(), None if mask_OI is None else mask_OI[rows]
        masked = weight if mask is None else weight * mask
        loop = _QuantizingLoop(
            factor_II,
            (weight if update else masked).T[order].contiguous(),
            None if mask is None else mask.T.contiguous(),
            order.tolist(),
            grid=fit(masked, group_size=group_size),
            refit=None if act_order else fit,
            choice=None if pattern is None else Choice.of(pattern, columns, group_size or columns),
        )
        loop.run(0, columns)
        parts.append(loop.result())
    return Quantized.join(parts)


class _QuantizingLoop(ColumnLoop):
    """The column loop on a grid.

    Attributes:
        value_IO: each weight just before rounding, in steps of the grid, in the weight's own order of columns.
        rounded_IO: q − z.
    """

    def __init__(
        self,
        factor_II: torch.Tensor,
        work_IO: torch.Tensor,
        kept_IO: torch.Tensor | None,
        order: list[int],
        *,
        grid: Grid,
        refit: Callable[..., Grid] | None,
        choice: Choice | None = None,
    ) -> None:
        super().__init__(factor_II, work_IO, kept_IO, order, choice=choice, group=grid.group_size)
        self.grid, self.refit = grid, refit
        self.scale, self.low, self.high = (part.squeeze(-1).T.contiguous() for part in grid.steps())
        self.rounded_IO = torch.empty_like(work_IO)
        self.grid_steps = self.scale, self.low, self.high, self.rounded_IO

    def _reach(self, start: int, stop: int) -> None:
        super()._reach(start, stop)
        group = self.grid.group_size
        if self.refit is not None and start % group == 0 and stop - start == group:
            self._fit_group(start, self.refit)

    def _settle(self, index: int) -> None:
        weight, column = self.work_IO[index], self.order[index]
        g = column // self.grid.group_size
        position = torch.div(weight, self.scale[g], out=self.value_IO[column])
        rounded = torch.round(position, out=self.rounded_IO[column])
        rounded.clamp_(self.low[g], self.high[g])
        if self.kept_IO is not None:
            rounded.mul_(self.kept_IO[column])
        weight.addcmul_(rounded, self.scale[g], value=-1).div_(self.factor[index, index])

    def _fit_group(self, start: int, refit: Callable[..., Grid]) -> None:
        """Replace a group's scale and bounds by those of its weights as updated so far."""
        group = self.grid.group_size
        weight_BO = self.work_IO[start : start + group]
        if self.kept_IO is not None:
            weight_BO = weight_BO * self.kept_IO[start : start + group]
        fitted = refit(weight_BO.T, group_size=None).steps()
        for target, value in zip((self.scale, self.low, self.high), fitted, strict=True):
            target[start // group] = value.flatten()

    def result(self) -> Quantized:
        """Return codes, grid and offsets."""
        grid = self.grid
        zero_IO = (-self.low).repeat_interleave(grid.group_size, dim=0)
        codes = (self.rounded_IO + zero_IO).to(torch.uint8).T.contiguous()
        offset = self.value_IO.sub_(self.rounded_IO).mul_(256).round_().clamp_(-127, 127)
        if self.kept_IO is not None:
            offset.mul_(self.kept_IO)
        if self.refit is not None:
            scale = self.scale.T.contiguous().to(grid.scale_OG.dtype)
            zero = (-self.low).T.contiguous().to(torch.uint8)
            grid = Grid(scale, zero, grid.bits, grid.columns, grid.symmetric)
        mask = None if self.kept_IO is None else self.kept_IO.T.contiguous()
        return Quantized(codes, grid, offset.to(torch.int8).T.contiguous(), mask)
