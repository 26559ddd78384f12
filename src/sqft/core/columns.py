"""The column loop that prunes, quantises, or does both at once: each column's error goes on to the columns to come.

    e_j = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e_j · U_jk   for k > j,   U the upper Cholesky factor of H⁻¹
                                 (Frantar et al. 2022, algorithm 1; Frantar and Alistarh 2023, algorithm 1)

Shapes: O out features, I in features, B columns of a block.

ŵ_j is what a column may be: 0 where the mask prunes, the nearest value of the grid where there is one, and the weight
itself elsewhere. So pruning and quantising are one step under two constraints, and this class is the first of them;
:mod:`sqft.core.gptq` adds the grid. The mask is given, or chosen in the loop from the weights as updated so far.

Columns are taken in recursive halves: when the first half is done, its errors go to the second half in one matrix
product. Rows are independent, so linears that share an input go through as one tall weight: the loop, whose cost is its
number of small operations, runs once for them. A leaf of the halving is one call of a kernel (:mod:`sqft.kernels`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from sqft.core.grid import stretches
from sqft.core.mask import keep_highest, mask_from_score
from sqft.core.statistics import inverse_cholesky
from sqft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_LEAF = 8  # columns updated one by one; so few that an update stays in cache and on one thread
_BLOCK = 128  # columns whose mask is chosen together; the best of SparseGPT's ablation


@dataclass(frozen=True)
class Pattern:
    """How much is pruned, and where: per output row, or N of every M along it."""

    sparsity: float
    structure: tuple[int, int] | None = None


@dataclass(frozen=True)
class Choice:
    """SparseGPT's criterion: the least w² / U_jj² of a block of columns are pruned when the loop reaches the block.

    Attributes:
        pattern: how much is pruned of each row.
        width: columns of a block.
    """

    pattern: Pattern
    width: int

    @classmethod
    def of(cls, pattern: Pattern, columns: int, group_size: int | None = None) -> Choice:
        """Return the choice for rows of `columns`: in blocks of 128, or of as many whole groups as that holds.

        An N:M pattern is chosen when the loop reaches it, as in the reference; groups must not cut it.

        Raises:
            InputError: group_m does not divide the row.
        """
        if pattern.structure is not None:
            keep_n, unit = pattern.structure
            if columns % unit:
                raise InputError(f"pattern {keep_n}:{unit} does not divide rows of {columns} weights")
            return cls(pattern, unit if group_size is None or group_size % unit == 0 else math.lcm(unit, group_size))
        if group_size is None or group_size > _BLOCK:
            return cls(pattern, _BLOCK)
        return cls(pattern, _BLOCK // group_size * group_size)

    def kept(
        self, weight_BO: torch.Tensor, allowed_BO: torch.Tensor | None, factor_B: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Return which weights of a block are kept, bool [B, O].

        Args:
            weight_BO: as updated so far.
            allowed_BO: bool, False is pruned whatever its score, and counted first; None allows all.
            factor_B: U_jj.
            start: the block's first column.

        Raises:
            NumericalError: a weight is NaN or infinite.
        """
        score_BO = (weight_BO / factor_B.unsqueeze(1)).square_()
        if allowed_BO is not None:
            score_BO.masked_fill_(~allowed_BO, -1)
        if self.pattern.structure is not None:
            keep_n, group_m = self.pattern.structure
            parts = [keep_highest(part_MO, keep_n) for part_MO in score_BO.split(group_m)]
            kept_BO = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            stop = start + len(factor_B)
            # Whole counts per row add up over the blocks to int(I * sparsity), whatever the block's width.
            count = int(stop * self.pattern.sparsity) - int(start * self.pattern.sparsity)
            kept_BO = mask_from_score(score_BO.T.contiguous(), (count + 0.5) / len(factor_B)).T
        return kept_BO if allowed_BO is None else kept_BO & allowed_BO


class ColumnLoop:
    """The state of one run that prunes; columns of the weight are rows here, so that each is contiguous.

    Attributes:
        factor: U, in the loop's order of columns.
        work_IO: weights yet to come, updated so far, in the loop's order; of columns that are done, their errors.
        kept_IO: bool, in the weight's own order of columns; None keeps all. With a choice: what may be kept, and of
            blocks that were reached, what is.
        value_IO: what a column became, in the weight's own order.
        order_I: the loop's order of columns, int32, for the kernel.
        grid_steps: (scale, lowest, highest [G, O], rounded [I, O]) of a loop on a grid, for the kernel.
    """

    grid_steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self,
        factor_II: torch.Tensor,
        work_IO: torch.Tensor,
        kept_IO: torch.Tensor | None,
        order: list[int],
        *,
        choice: Choice | None = None,
        group: int | None = None,
    ) -> None:
        self.allows_all = kept_IO is None or bool(kept_IO.all())
        if choice is not None:  # the loop writes its choice there
            kept_IO = torch.ones_like(work_IO, dtype=torch.bool) if kept_IO is None else kept_IO.clone()
        self.factor, self.work_IO, self.kept_IO, self.order = factor_II, work_IO, kept_IO, order
        self.choice, self.chosen = choice, 0
        # Splits fall between the widest units while they can, so that a unit is whole, and fully updated, when the
        # loop reaches it. Patterns that fit into a leaf are chosen there.
        width = choice and (choice.width if choice.width > _LEAF else _LEAF // choice.width * choice.width)
        self.units = sorted({size for size in (group, width) if size}, reverse=True)
        self.value_IO = torch.empty_like(work_IO)
        self.leaf, self.order_I = _LEAF, torch.empty(0)
        self.kernel = kernel_on(work_IO.device)
        if self.kernel is not None and (choice is None or choice.width >= self.kernel.LEAF):
            self.leaf, self.order_I = self.kernel.LEAF, torch.tensor(order, dtype=torch.int32, device=work_IO.device)
        else:
            self.kernel = None

    def run(self, start: int, stop: int) -> None:
        """Settle columns start to stop, which have received all errors of the columns before them."""
        self._reach(start, stop)
        if stop - start <= min([self.leaf, *self.units]):
            if self.kernel is not None:
                self.kernel.settle_leaf(self, start, stop)
                return
            for index in range(start, stop):
                if self.choice is not None and index == self.chosen:
                    self._choose(self.choice, index, min(index + self.choice.width, stop))
                self._settle(index)
                if index + 1 < stop:
                    factor_B = self.factor[index, index + 1 : stop]
                    self.work_IO[index + 1 : stop].addr_(factor_B, self.work_IO[index], alpha=-1)
            return
        half = (stop - start) // 2
        unit = next((size for size in self.units if stop - start > size), 1)
        middle = start + max(unit, half // unit * unit)
        self.run(start, middle)
        self.work_IO[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.work_IO[start:middle], alpha=-1)
        self.run(middle, stop)

    def _reach(self, start: int, stop: int) -> None:
        """Take in that these columns come next, and have received all errors of those before them."""
        if self.choice is not None and start == self.chosen and stop - start <= self.choice.width:
            self._choose(self.choice, start, stop)

    def _choose(self, choice: Choice, start: int, stop: int) -> None:
        """Choose the mask of a block."""
        assert self.kept_IO is not None
        block = slice(start, stop)
        allowed_BO = None if self.allows_all else self.kept_IO[block]
        self.kept_IO[block] = choice.kept(self.work_IO[block], allowed_BO, self.factor.diagonal()[block], start)
        self.chosen = stop

    def _settle(self, index: int) -> None:
        """Give a column its value; from here on its row holds the error."""
        weight, column = self.work_IO[index], self.order[index]
        value = self.value_IO[column].copy_(weight)
        if self.kept_IO is not None:
            value.mul_(self.kept_IO[column])
        weight.sub_(value).div_(self.factor[index, index])


def loop_cost(weights_OI: Sequence[torch.Tensor]) -> float:
    """Return how long the loop over weights with one input takes, and their hessian's factor, beside other loops.

    A column costs its rows and its part of the factor.
    """
    rows, columns = sum(len(weight) for weight in weights_OI), weights_OI[0].shape[1]
    return float(columns * (rows + columns))


def kernel_on(device: torch.device) -> ModuleType | None:
    """Return what settles a leaf in one call: on CUDA :mod:`sqft.kernels.columns`, on a CPU :mod:`sqft.kernels.settle`.

    None without Triton on the one, without a C++ compiler on the other.
    """
    if device.type == "cuda":
        return _on_card()
    return _on_processor() if device.type == "cpu" else None


@cache
def _on_card() -> ModuleType | None:
    try:
        from sqft.kernels import columns
    except ImportError:
        return None
    return columns


@cache
def _on_processor() -> ModuleType | None:
    from sqft.kernels import settle

    return settle if settle.available() else None


def prune_columns(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    mask_OI: torch.Tensor | None,
    *,
    pattern: Pattern | None = None,
    damping: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune, and let the columns to come make up for it; see the module.

    Columns keep their order: by falling activity, as GPTQ takes them, a sixth more is lost (docs/decisions.md).

    Args:
        weight_OI: [O, I], any float dtype, unpruned.
        hessian_II: sum or mean of x xᵀ over calibration tokens, float32 [I, I]; its scale does not matter.
        mask_OI: bool, True = kept; None may keep all.
        pattern: choose the mask in the loop, by SparseGPT's criterion, among what `mask_OI` keeps.
        damping: added to the hessian's diagonal, as a fraction of its mean.

    Returns:
        (weight [O, I] in its own dtype, exactly 0 where pruned; mask [O, I]).

    Raises:
        NumericalError: the damped hessian is not positive definite, or it or a score is not finite.
        InputError: an N:M pattern does not divide the row.
    """
    factor_II = inverse_cholesky(hessian_II, damping)
    columns = weight_OI.shape[1]
    pruned, masks = torch.empty_like(weight_OI), torch.ones_like(weight_OI, dtype=torch.bool)
    for rows in stretches(weight_OI):
        loop = ColumnLoop(
            factor_II,
            weight_OI[rows].T.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            None if mask_OI is None else mask_OI[rows].T.contiguous(),
            list(range(columns)),
            choice=None if pattern is None else Choice.of(pattern, columns),
        )
        loop.run(0, columns)
        if loop.kept_IO is not None:
            masks[rows] = loop.kept_IO.T
        # where, not a product: 0 * -1 is -0.
        pruned[rows] = torch.where(masks[rows], loop.value_IO.T, 0.0).to(weight_OI.dtype)
    return pruned, masks
