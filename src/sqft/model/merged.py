"""The merged weight of each adapted module, computed from folders on disk: what merge writes and verify expects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqft.core.delta import effective_weight
from sqft.core.mask import pack_mask
from sqft.errors import Problems
from sqft.model.checkpoint import Checkpoint
from sqft.model.layers import load_mask
from sqft.model.targets import DiskNames, skeleton

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sqft.model.adapter import LowRank, SavedAdapter


class BaseWeights:
    """The adapted weights of a base on disk, by module name: on-disk name, layout and mask.

    Raises:
        InputError: a module of the adapter is no plain linear of the base, or has another shape; all at once.
    """

    def __init__(self, base: Path, adapter: SavedAdapter, *, trust_remote_code: bool = False) -> None:
        self.base = base
        self.checkpoint = Checkpoint(base)
        model = skeleton(base, trust_remote_code=trust_remote_code)
        disk_names: dict[str, list[str]] = {}
        for name, parameter in DiskNames(model, self.checkpoint).parameter_of.items():
            disk_names.setdefault(parameter, []).append(name)
        self.names: dict[str, str] = {}
        self.transposed: dict[str, bool] = {}
        with Problems(f"adapter {adapter.path} on base {base}") as problems:
            for module, low in adapter.modules.items():
                stored = disk_names.get(f"{module}.weight", [])
                if len(stored) != 1:
                    problems.add(f"{module} is not one weight of the base ({len(stored)} tensors on disk)")
                    continue
                self.names[module] = stored[0]
                shape = self.checkpoint.entries[stored[0]].shape
                wanted = (low.lora_B.shape[0], low.lora_A.shape[1])
                self.transposed[module] = type(model.get_submodule(module)).__name__ == "Conv1D"
                if (shape[::-1] if self.transposed[module] else shape) != wanted:
                    problems.add(f"{module}: the adapter is for {list(wanted)}, the base has {list(shape)}")

    def merged(self, module: str, low: LowRank, *, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (base weight, W'), both in their on-disk layout."""
        weight = self.checkpoint.read(self.names[module])
        weight_OI = weight.T if self.transposed[module] else weight
        packed = pack_mask(self.mask(module, weight)) if masked else None
        merged = effective_weight(weight_OI, low.lora_A, low.lora_B, low.scaling, packed)
        return weight, merged.T if self.transposed[module] else merged

    def mask(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the mask [O, I]: the base's stored one, else its exact zeros."""
        stored = load_mask(self.base, self.names[module])
        mask = weight != 0 if stored is None else stored
        return mask.T.contiguous() if self.transposed[module] else mask
