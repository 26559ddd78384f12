"""What quantising does with one block: prune it in the joint pass, quantise its linears, write them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqft import processes
from sqft.core.columns import loop_cost
from sqft.core.gptq import Quantized, gptq, round_to_nearest
from sqft.core.grid import stretches
from sqft.core.mask import finite
from sqft.errors import NumericalError
from sqft.memory import release_memory
from sqft.model.calibrate import Block, overflow_remedy
from sqft.model.prune import BlockPruner, disk_masks, mask_view
from sqft.storage.masks import SPARSE_FROM, MaskFile, load_mask

if TYPE_CHECKING:
    from sqft.core.columns import Pattern
    from sqft.model.targets import Target
    from sqft.recipe import QuantizeConfig
    from sqft.storage.checkpoint import Checkpoint
    from sqft.storage.scheme import Scheme


@dataclass
class Quantizing:
    """The visitor's state: what to do with a block, and what was done so far."""

    config: QuantizeConfig
    scheme: Scheme
    source: Path
    targets: set[Target]
    pruner: BlockPruner | None
    pruned: set[Target]
    output: Checkpoint
    start: Checkpoint
    masks: MaskFile
    written: set[str] = field(default_factory=set)
    layers: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0

    def __call__(self, block: Block) -> None:
        """Prune and quantise one block in memory, and write it."""
        disk_name = {parameter: name for name, parameter in block.names.parameter_of.items()}
        masks: dict[str, torch.Tensor] = {}
        pruned = [t for t in block.targets if t in self.pruned]
        if self.pruner is not None:
            masks = self.pruner(block, pruned, [t for t in pruned if self._in_one_loop(t)])
        groups = self._groups(block)
        works = [partial(self._quantize, block, group, masks, disk_name) for group in groups]
        costs = [loop_cost([target.view(block.model) for target in group]) for group in groups]
        made = processes.each(works, costs, block.device)
        for group, tensors in zip(groups, made, strict=True):
            self._take(block, group, tensors, masks, disk_name)
        if self.pruner is not None:
            self.masked += sum(not bool(mask_view(t, masks).all()) for t in pruned)
            for name, mask in disk_masks(block, masks, pruned):
                self.masks.write(name, mask)
        # Linears that were pruned and stay float; all else is copied from the source.
        floats = {f"{t.module}.{t.parameter}" for t in block.targets if t in self.pruned and t not in self.targets}
        for name, tensor in block.names.to_disk(block.parameters() if floats else {}).items():
            if block.names.parameter_of[name] in floats:
                self._write(name, tensor.to(self.output.entries[name].dtype))

    def _store(self, name: str, quantized: Quantized) -> None:
        for suffix, tensor in self.scheme.encode(quantized.codes_OI, quantized.grid).items():
            self._write(f"{name.removesuffix('.weight')}.{suffix}", tensor)
        self.start.write(name, quantized.offset_OI)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self.output.write(name, tensor)
        self.written.add(name)

    def _groups(self, block: Block) -> list[list[Target]]:
        """Return the block's targets, those with the same input together: they have one hessian and one column loop."""
        groups: dict[tuple[int, bool], list[Target]] = {}
        for target in block.targets:
            if target in self.targets:
                shared = id(block.statistics[target]), self._in_one_loop(target)
                groups.setdefault(shared, []).append(target)
        return list(groups.values())

    def _in_one_loop(self, target: Target) -> bool:
        """Whether one loop over a target's columns both prunes and quantises it, from its unpruned weight."""
        return (
            self.pruner is not None
            and (self.pruner.in_loop or self.pruner.update)
            and self.config.method == "gptq"
            and target in self.pruned
            and target in self.targets
        )

    def _quantize(
        self, block: Block, group: list[Target], masks: dict[str, torch.Tensor], disk_name: dict[str, str]
    ) -> tuple[torch.Tensor, ...]:
        """Quantise linears that share an input, as one tall weight; return what :meth:`_take` takes."""
        release_memory()
        views, names = [target.view(block.model) for target in group], [disk_name[f"{t.module}.weight"] for t in group]
        mask_OI = torch.cat([self._mask(*each, masks) for each in zip(group, views, names, strict=True)])
        weight_OI, one_loop = torch.cat(views), self._in_one_loop(group[0])
        if not one_loop:
            weight_OI.mul_(mask_OI)
        seen = block.statistics[group[0]]
        hessian_II = seen.hessian_II
        options: dict[str, Any] = {
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "symmetric": self.config.symmetric,
            "dtype": self._scale_dtype(names[0]),
            "least_zero": self.scheme.least_zero,
        }
        try:
            if self.config.method == "rtn":
                tall = replace(round_to_nearest(weight_OI, **options), mask_OI=mask_OI)
            else:
                if hessian_II is None or seen.tokens == 0:
                    raise NumericalError("no calibration token reached it; use more or other calibration samples")
                options |= {"act_order": self.config.act_order, "damping": self.config.damping}
                pattern = self._pattern(group[0])
                tall = gptq(weight_OI, hessian_II, mask_OI, update=one_loop, pattern=pattern, **options)
        except NumericalError as error:
            listed = ", ".join(target.name for target in group)
            raise NumericalError(f"{listed}: {error} (quantize.calibration, quantize.damping)") from error
        lost = _relative_error(tall, weight_OI, hessian_II)
        return (torch.tensor([math.nan if lost is None else lost], dtype=torch.float64), *tall.tensors)

    def _take(
        self,
        block: Block,
        group: list[Target],
        made: tuple[torch.Tensor, ...],
        masks: dict[str, torch.Tensor],
        disk_name: dict[str, str],
    ) -> None:
        """Write what quantising made of linears; the model in memory gets the dequantised weights."""
        tall = Quantized.of(made[1:], bits=self.config.bits, symmetric=self.config.symmetric)
        assert tall.mask_OI is not None
        views, error = [target.view(block.model) for target in group], float(made[0])
        rows = [view.shape[0] for view in views]
        for target, view, part, kept in zip(group, views, tall.split(rows), tall.mask_OI.split(rows), strict=True):
            name = disk_name[f"{target.module}.weight"]
            if target not in self.pruned:
                self._keep_mask(name, kept)
            elif self._pattern(target) is not None:
                mask_view(target, masks).copy_(kept)
            view.copy_(part.grid.dequantize(part.codes_OI, view.dtype))
            if not finite(view):
                raise NumericalError(
                    f"{target.name}: its quantised weights are NaN or Inf; {overflow_remedy(view.dtype)}"
                )
            self._store(name, part)
            self.layers.append(
                {
                    "name": target.name,
                    "weights": view.numel(),
                    "sparsity": round(1 - int(kept.count_nonzero()) / kept.numel(), 6),
                    "relative_error": None if math.isnan(error) else error,
                }
            )

    def _pattern(self, target: Target) -> Pattern | None:
        """Return by what pattern the loop chooses the target's mask; None where it chooses none."""
        chooses = self.pruner is not None and self.pruner.in_loop and self._in_one_loop(target)
        return self.pruner.pattern if chooses and self.pruner is not None else None

    def _scale_dtype(self, name: str) -> torch.dtype:
        return self.output.entries[f"{name.removesuffix('.weight')}.{self.scheme.suffixes[1]}"].dtype

    def _mask(self, target: Target, view: torch.Tensor, name: str, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what is not zero: not just pruned, not outside the model's stored mask, and not 0 anyway."""
        kept = view != 0
        stored = load_mask(self.source, name)
        if stored is not None:
            kept &= stored.to(kept.device)
        if target in self.pruned:
            kept &= mask_view(target, masks)
        return kept

    def _keep_mask(self, name: str, kept_OI: torch.Tensor) -> None:
        """Write the mask of a weight that came sparse."""
        stored = load_mask(self.source, name)
        if stored is not None:
            self.masks.write(name, stored)
        elif int(kept_OI.count_nonzero()) <= (1 - SPARSE_FROM) * kept_OI.numel():
            self.masks.write(name, kept_OI)


def _relative_error(tall: Quantized, weight_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float | None:
    """Return ‖(Ŵ − W) X‖² / ‖W X‖² on the calibration inputs, None without a hessian."""
    if hessian_II is None:
        return None
    lost, whole = 0.0, 0.0
    for rows in stretches(weight_OI):
        weight = weight_OI[rows].float()
        difference = tall.grid.rows(rows).dequantize(tall.codes_OI[rows]).sub_(weight)
        lost += float((difference @ hessian_II).mul_(difference).sum())
        whole += float((weight @ hessian_II).mul_(weight).sum())
    return round(lost / whole, 6) if whole > 0 else 0.0
