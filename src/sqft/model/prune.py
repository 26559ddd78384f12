"""Prune one block of a model in memory, whatever stage walks over the blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sqft import processes
from sqft.core.columns import Pattern, loop_cost, prune_columns
from sqft.core.mask import finite, mask_from_score
from sqft.core.pruners import Method, magnitude, resolve_method
from sqft.errors import InputError, NumericalError
from sqft.model.calibrate import overflow_remedy
from sqft.recipe import parse_pattern
from sqft.storage.masks import read_masks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from sqft.core.statistics import Statistics
    from sqft.model.calibrate import Block
    from sqft.model.names import DiskNames
    from sqft.model.targets import Target
    from sqft.recipe import SparsifyConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockPruner:
    """Zeroes weights of a block by a method's choice or by given masks.

    Attributes:
        method: how weights are chosen.
        pattern: how many, and where.
        given: packed masks by on-disk weight name that are used instead, or None.
        unreached_by_magnitude: what to do with an expert that no calibration token reached; False is an error.
        update: whether the weights that stay make up for those that a score or a given mask prunes.
    """

    method: Method
    pattern: Pattern
    given: dict[str, torch.Tensor] | None = None
    unreached_by_magnitude: bool = False
    update: bool = False

    @property
    def needs_hessian(self) -> bool:
        """Whether calibration collects second-order statistics for it."""
        return self.update or (self.given is None and self.method.needs_hessian)

    @property
    def in_loop(self) -> bool:
        """Whether the mask is chosen while the loop walks over the columns."""
        return self.given is None and self.method.in_loop

    def __call__(
        self, block: Block, targets: Collection[Target], left: Collection[Target] = ()
    ) -> dict[str, torch.Tensor]:
        """Prune the targets in memory.

        Args:
            block: where they are.
            targets: of the block.
            left: those that the quantiser's column loop prunes: they keep their weights, and where the mask is chosen
                in the loop, theirs says what may be kept.

        Returns:
            Bool masks of all the block's parameters, by parameter name, True = kept.

        Raises:
            InputError: an expert that no calibration token reached, by name.
            NumericalError: scores or pruned weights that are NaN or Inf, by name.
        """
        if self.given is None:
            masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in block.parameters().items()}
        else:
            given = block.names.in_memory(f"{block.prefix}.", self.given)
            masks = {name: mask.to(block.device) for name, mask in given.items()}
        chosen = []
        for target in targets:
            if self.in_loop and target in left:
                mask_view(target, masks).copy_(target.view(block.model) != 0)
            else:
                chosen.append(target)
        views = [(target.view(block.model), mask_view(target, masks)) for target in chosen]
        works = [
            partial(self._chosen, target, *view, block.statistics[target], target not in left)
            for target, view in zip(chosen, views, strict=True)
        ]
        made = processes.each(works, [loop_cost([weight_OI]) for weight_OI, _ in views], block.device)
        for target, (weight_OI, mask_OI), (pruned, mask) in zip(chosen, views, made, strict=True):
            mask_OI.copy_(mask)
            if target not in left:
                weight_OI.copy_(pruned)
        return masks

    def _chosen(
        self,
        target: Target,
        weight_OI: torch.Tensor,
        given_OI: torch.Tensor,
        statistics: Statistics,
        settle: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight as pruned, and its mask; without `settle` the weight is not made up for."""
        try:
            pruned, mask = (weight_OI, given_OI) if self.given else self._prune(target, weight_OI, statistics)
            # What was zero before stays so: an update, or training, could fill it again otherwise.
            mask = mask & (weight_OI != 0) if self.given is None else mask
            if self.update and settle and statistics.tokens:
                assert statistics.hessian_II is not None
                pruned, _ = prune_columns(weight_OI, statistics.hessian_II, mask)
        except NumericalError as error:
            raise NumericalError(f"{target.name}: {error}") from error
        if not finite(pruned):
            raise NumericalError(
                f"{target.name}: the weights that pruning leaves have NaN or Inf; {overflow_remedy(weight_OI.dtype)}"
            )
        return torch.where(mask, pruned, 0.0), mask

    def _prune(
        self, target: Target, weight_OI: torch.Tensor, statistics: Statistics
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if statistics.tokens or not self.method.needs_inputs:
            return self.method.prune(weight_OI, statistics, self.pattern)
        if self.unreached_by_magnitude:
            logger.warning("%s: no calibration token reached it; pruned by magnitude", target.name)
            score = magnitude(weight_OI, statistics)
            mask = mask_from_score(score, self.pattern.sparsity, self.pattern.structure)
            return torch.where(mask, weight_OI, 0.0), mask
        raise InputError(
            f"{target.name}: no calibration token reached it, so its inputs are unknown; use more or other calibration "
            "samples (sparsify.calibration), or allow sparsify.unreached_experts: magnitude"
        )


def make_pruner(config: SparsifyConfig, names: DiskNames, targets: Collection[Target]) -> BlockPruner:
    """Return the pruner that a recipe asks for.

    Args:
        config: the recipe's.
        names: the model's tensors on disk.
        targets: what is to be pruned.

    Raises:
        InputError: the method, pattern or file of masks cannot be used.
    """
    method = resolve_method(config.method)
    if config.update and config.mask is None and not (method.only_ranks or method.in_loop):
        raise InputError(
            f"sparsify.method {config.method} is a pruner, which changes the weights that stay by itself; leave "
            "sparsify.update out"
        )
    touched = {f"{t.module}.{t.parameter}" for t in targets}
    targeted = {name for name, parameter in names.parameter_of.items() if parameter in touched}
    return BlockPruner(
        method,
        Pattern(config.sparsity, parse_pattern(config.pattern)),
        read_masks(Path(config.mask), names.checkpoint, targeted) if config.mask else None,
        unreached_by_magnitude=config.unreached_experts == "magnitude",
        update=config.updates and (config.mask is not None or method.only_ranks),
    )


def masked_of(masked: int, targets: Collection[Target]) -> str:
    """Return how many of the targets a file of masks prunes, for a stage's report."""
    rest = len(targets) - masked
    return f"; masked {masked} of {len(targets)} targeted linears" + (f"; the other {rest} stay dense" if rest else "")


def mask_view(target: Target, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a target's mask [O, I] as a view of its parameter's."""
    return target.of(masks[f"{target.module}.{target.parameter}"])


def disk_masks(
    block: Block, masks: dict[str, torch.Tensor], targets: Collection[Target]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the targets' masks as they lie on disk: (on-disk name, bool mask)."""
    touched = {f"{t.module}.{t.parameter}" for t in targets}
    for name, mask in block.names.to_disk(_bytes(masks)).items():
        if block.names.parameter_of[name] in touched:
            yield name, mask.view(torch.bool)


def _bytes(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return bool masks as uint8, which transformers' conversions take, over the same memory."""
    return {name: mask.view(torch.uint8) for name, mask in masks.items()}
