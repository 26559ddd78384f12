"""What quantising does with one block: prune it in the joint pass, quantise its linears, write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqft import processes
from sqft.core.gptq import Quantized, gptq, round_to_nearest
from sqft.core.grid import stretches
from sqft.core.mask import finite
from sqft.errors import NumericalError
from sqft.memory import release_memory
from sqft.model.calibrate import Block, overflow_remedy
from sqft.model.prune import BlockPruner, disk_masks, mask_view
from sqft.storage.masks import SPARSE_FROM, MaskFile, load_mask

if TYPE_CHECKING:
    from sqft.core.statistics import Statistics
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
        for group in self._groups(block):
            release_memory()
            self._quantize(block, group, masks, disk_name)
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
    ) -> None:
        """Quantise linears that share an input and write them; the model in memory gets the dequantised weights."""
        views = [target.view(block.model) for target in group]
        mask_OI = torch.cat([self._mask(t, v, masks, disk_name) for t, v in zip(group, views, strict=True)])
        weight_OI, one_loop = torch.cat(views), self._in_one_loop(group[0])
        pattern = self.pruner.pattern if one_loop and self.pruner is not None and self.pruner.in_loop else None
        if not one_loop:
            weight_OI.mul_(mask_OI)
        hessian = block.statistics[group[0]].hessian_II
        options: dict[str, Any] = {
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "symmetric": self.config.symmetric,
            "dtype": self._scale_dtype(disk_name[f"{group[0].module}.weight"]),
            "least_zero": self.scheme.least_zero,
        }
        if self.config.method == "gptq":
            options |= {"act_order": self.config.act_order, "damping": self.config.damping}
            options |= {"update": one_loop, "pattern": pattern}
        rounding = partial(self._round, weight_OI, mask_OI, block.statistics[group[0]], options)
        try:
            tensors = processes.by_rows(len(weight_OI), rounding)
        except NumericalError as error:
            names = ", ".join(target.name for target in group)
            raise NumericalError(f"{names}: {error} (quantize.calibration, quantize.damping)") from error
        tall = Quantized.of(tensors, bits=self.config.bits, symmetric=self.config.symmetric)
        lost = _relative_error(tall, weight_OI, hessian)
        rows = [view.shape[0] for view in views]
        kept_OI = mask_OI if tall.mask_OI is None else tall.mask_OI
        for target, view, part, kept in zip(group, views, tall.split(rows), kept_OI.split(rows), strict=True):
            if pattern is not None:
                mask_view(target, masks).copy_(kept)
            view.copy_(part.grid.dequantize(part.codes_OI, view.dtype))
            if not finite(view):
                raise NumericalError(
                    f"{target.name}: its quantised weights are NaN or Inf; {overflow_remedy(view.dtype)}"
                )
            self._store(disk_name[f"{target.module}.weight"], part)
            self.layers.append(
                {
                    "name": target.name,
                    "weights": view.numel(),
                    "sparsity": round(1 - int(kept.count_nonzero()) / kept.numel(), 6),
                    "relative_error": lost,
                }
            )

    def _round(
        self, weight_OI: torch.Tensor, mask_OI: torch.Tensor, seen: Statistics, options: dict[str, Any], rows: slice
    ) -> tuple[torch.Tensor, ...]:
        """Return what quantising makes of some rows."""
        if self.config.method == "rtn":
            return round_to_nearest(weight_OI[rows], **options).tensors
        if seen.hessian_II is None or seen.tokens == 0:
            raise NumericalError("no calibration token reached it; use more or other calibration samples")
        return gptq(weight_OI[rows], seen.hessian_II, mask_OI[rows], **options).tensors

    def _scale_dtype(self, name: str) -> torch.dtype:
        return self.output.entries[f"{name.removesuffix('.weight')}.{self.scheme.suffixes[1]}"].dtype

    def _mask(
        self, target: Target, view: torch.Tensor, masks: dict[str, torch.Tensor], disk_name: dict[str, str]
    ) -> torch.Tensor:
        """Return what is not zero: not just pruned, not outside the model's stored mask, and not 0 anyway."""
        kept = view != 0
        name = disk_name[f"{target.module}.weight"]
        stored = load_mask(self.source, name)
        if stored is not None:
            kept &= stored.to(kept.device)
        if target in self.pruned:
            kept &= mask_view(target, masks)
        elif stored is not None:
            self.masks.write(name, stored)
        elif int(kept.count_nonzero()) <= (1 - SPARSE_FROM) * kept.numel():
            self.masks.write(name, kept)
        return kept


def _relative_error(tall: Quantized, weight_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float | None:
    """Return ‖(Ŵ − W) X‖² / ‖W X‖² on the calibration inputs, None without a hessian."""
    if hessian_II is None:
        return None
    sums = torch.zeros(2, dtype=torch.float64)
    own = processes.share(len(weight_OI))
    for part in stretches(weight_OI[own]):
        rows = slice(own.start + part.start, own.start + part.stop)
        weight = weight_OI[rows].float()
        difference = tall.grid.rows(rows).dequantize(tall.codes_OI[rows]).sub_(weight)
        sums[0] += float((difference @ hessian_II).mul_(difference).sum())
        sums[1] += float((weight @ hessian_II).mul_(weight).sum())
    processes.add_up(sums)
    lost, whole = sums.tolist()
    return round(lost / whole, 6) if whole > 0 else 0.0
