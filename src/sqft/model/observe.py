"""What the inputs of a block's linears look like, observed where they are used.

A torch-function mode watches every matrix product and recognises a target by where its weight lies in memory. That
covers nn.Linear, Conv1D and the slices of fused experts with one mechanism. Where several processes share the work,
each has run calibration samples of its own, and what they saw is added up.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from sqft import processes
from sqft.core.statistics import Statistics
from sqft.model.products import products

if TYPE_CHECKING:
    from sqft.model.targets import Target


class AllSeen(BaseException):
    """Ends a forward that has nothing more to show; not an Exception, which a model's code may catch."""


class Observer(TorchFunctionMode):
    """Adds the inputs of every product with a target's weight to that target's statistics.

    Targets that are given the very same tensor (q, k and v; gate and up) share one set of statistics: the first of
    them collects, the others point to it.

    Entered once for each forward. If the first used every target exactly once, a later one is ended by
    :class:`AllSeen` at its last target, before the product: a quarter of a decoder block's arithmetic.
    """

    def __init__(self, weights: dict[Target, torch.Tensor], *, hessian: bool) -> None:
        super().__init__()
        self.statistics = {
            t: Statistics.empty(w.shape[1], hessian=hessian, device=w.device) for t, w in weights.items()
        }
        self._targets = {_identity(w): t for t, w in weights.items()}
        self._storages = {w.untyped_storage().data_ptr() for w in weights.values()}
        self._last: tuple[torch.Tensor, Statistics] | None = None
        self._uses: Counter[Target] = Counter()
        self._once: bool | None = None  # whether the first forward used every target once

    def __enter__(self) -> Observer:
        """Begin a forward."""
        self._uses.clear()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """End a forward."""
        super().__exit__(*raised)
        if self._once is None:
            self._once = self._each_used_once()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for product in products(func, args, kwargs):
            if product.operand.untyped_storage().data_ptr() in self._storages:
                for weight, x_TI in product.matrices():
                    target = self._targets.get(_identity(weight))
                    if target is not None:
                        self._see(target, x_TI, product.source if product.alone else x_TI)
                        self._uses[target] += 1
                        if self._once and self._each_used_once():
                            raise AllSeen
        return func(*args, **(kwargs or {}))

    def _each_used_once(self) -> bool:
        return len(self._uses) == len(self.statistics) and set(self._uses.values()) == {1}

    def forget(self) -> None:
        """Let go of the last input, which is as large as any activation."""
        self._last = None

    def _see(self, target: Target, x_TI: torch.Tensor, source: torch.Tensor) -> None:
        if self._last is not None and self._last[0] is source:
            shared, own = self._last[1], self.statistics[target]
            if own is shared:
                return
            if own.tokens == 0:
                self.statistics[target] = shared
                return
        with torch._C.DisableTorchFunction():
            self.statistics[target].add(x_TI.detach())
        self._last = (source, self.statistics[target])


def add_up(statistics: dict[Target, Statistics]) -> None:
    """Replace this process's statistics by those of all, in place.

    Linears with one input share statistics, which a process knows from its own tokens. An expert that none of them
    reached shares what the others say. Sums are added in another order than one process does, so they differ from
    its by rounding.

    Args:
        statistics: by target, the same targets in the same order in every process.

    Raises:
        ProcessLostError: one of the others has ended.
    """
    if processes.count() == 1 or not statistics:
        return
    own = list(statistics.values())
    leaders, total = _agree(own)
    sums: dict[int, Statistics] = {}
    for index in sorted(set(leaders)):
        shared = any(own[index] is other for other in sums.values())
        sums[index] = copy.deepcopy(own[index]) if shared else own[index]
    for index, summed in sums.items():
        processes.add_up(summed.squared_sum_I if summed.upper_II is None else summed.upper_II)
        summed.tokens = total[index]
    for target, leader in zip(statistics, leaders, strict=True):
        statistics[target] = sums[leader]


def _agree(own: list[Statistics]) -> tuple[list[int], list[int]]:
    """Return for each target whose statistics it shares, by number, and how many tokens all processes saw."""
    numbers = torch.arange(len(own))
    first_of = {id(one): index for index, one in reversed(list(enumerate(own)))}
    mine = torch.tensor([[first_of[id(one)] if one.tokens else -1 for one in own], [one.tokens for one in own]])
    # As many pieces of equal cost as processes: each has its own.
    said = processes.each([lambda: (mine,)] * processes.count(), [1.0] * processes.count())
    leader_PT, tokens_PT = torch.stack([one for (one,) in said]).unbind(1)
    highest = leader_PT.amax(dim=0)
    lowest = leader_PT.masked_fill(leader_PT < 0, len(own)).amin(dim=0)
    # Where they disagree, or none saw it, a target stands alone.
    leaders = torch.where(lowest == highest, highest, numbers)
    return leaders.tolist(), tokens_PT.sum(dim=0).tolist()


def _identity(weight: torch.Tensor) -> tuple[Any, ...]:
    # The stride of an axis of one entry means nothing.
    strides = [stride if size > 1 else 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)]
    return weight.data_ptr(), *weight.shape, *strides
