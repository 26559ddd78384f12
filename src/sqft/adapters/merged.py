"""The merged weight of each adapted module, computed from folders on disk: what merge writes and verify expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from sqft.adapters.attach import check_modules
from sqft.core.delta import effective_codes, effective_weight
from sqft.core.grid import QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask
from sqft.errors import Problems
from sqft.model.names import DiskNames
from sqft.model.targets import skeleton
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint, quantization_config
from sqft.storage.masks import SPARSE_FROM, load_mask, load_start

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from sqft.adapters.saved import LowRank, SavedAdapter


@dataclass(frozen=True)
class Merged:
    """One merged weight.

    Attributes:
        name: the tensor on disk that merging overwrites.
        tensor: what it becomes.
        weights: how many there are.
        zeros: how many are zero after merging.
        changed: how many differ from the base's.
        pruned: how many should stay zero; see :meth:`BaseWeights.promised`.
        filled_zeros: how many of those did not.
    """

    name: str
    tensor: torch.Tensor
    weights: int
    zeros: int
    changed: int
    pruned: int
    filled_zeros: int

    @classmethod
    def compare(
        cls,
        name: str,
        tensor: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        zero: torch.Tensor | int,
        mask: torch.Tensor | None,
    ) -> Merged:
        """Return it with its counts.

        Args:
            name: the tensor on disk.
            tensor: what it becomes.
            before: the base's weight, or its codes.
            after: the same of the merged one.
            zero: what a zero is among them, everywhere or at each place.
            mask: bool, True = kept; None: nothing should have stayed zero.
        """
        nonzero = after != zero
        weights = after.numel()
        zeros = weights - int(nonzero.count_nonzero())
        pruned = 0 if mask is None else weights - int(mask.count_nonzero())
        filled = 0 if mask is None else int(nonzero.logical_and_(~mask).count_nonzero())
        return cls(name, tensor, weights, zeros, int((before != after).count_nonzero()), pruned, filled)


class BaseWeights:
    """The adapted weights of a base on disk, by module name.

    Attributes:
        packed: the base's quantised weights, None for a float base.
        names: {module: the weight's name on disk, 'X.weight' for a quantised one too}.

    Raises:
        InputError: a module of the adapter is no plain linear of the base, has another shape, or the adapter's kind
            does not go with the base's precision; all at once.
    """

    def __init__(
        self, base: Path, adapter: SavedAdapter, *, device: torch.device | None = None, trust_remote_code: bool = False
    ) -> None:
        self.base, self.adapter = base, adapter
        # Only the ordered arithmetic is the same on every device.
        self.device = device if adapter.ordered else None
        self.packed = PackedCheckpoint(base) if quantization_config(base) is not None else None
        self.checkpoint = Checkpoint(base)
        model = skeleton(base, trust_remote_code=trust_remote_code)
        self._dtype = model.dtype
        stored = {} if self.packed is None else self.packed.stored_names()
        names = DiskNames(model, self.checkpoint, skip=stored)
        shapes = {name: self.checkpoint.entries[name].shape for name in names.parameter_of}
        disk_names: dict[str, list[str]] = {}
        for name, parameter in names.parameter_of.items():
            disk_names.setdefault(parameter, []).append(name)
        for name in () if self.packed is None else self.packed.shapes:
            disk_names.setdefault(names.parameter(name), []).append(name)
        if self.packed is not None:
            shapes |= self.packed.shapes
        linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        check_modules(adapter, base, {n for n in linears if check_target_module_exists(adapter.settings, n)})
        self.names: dict[str, str] = {}
        self.transposed: dict[str, bool] = {}
        with Problems(f"adapter {adapter.path} on base {base}") as problems:
            if adapter.kind == "quantized" and self.packed is None:
                problems.add("the adapter is quantisation-aware and the base is float; give the quantised base")
            if adapter.kind == "sparse" and self.packed is not None:
                problems.add("the adapter was trained on a float base and this one is quantised; give the float base")
            for module, low in adapter.modules.items():
                found = disk_names.get(f"{module}.weight", [])
                if len(found) != 1:
                    problems.add(f"{module} is not one weight of the base ({len(found)} tensors on disk)")
                    continue
                self.names[module] = found[0]
                shape = shapes[found[0]]
                wanted = (low.lora_B.shape[0], low.lora_A.shape[1])
                self.transposed[module] = isinstance(model.get_submodule(module), Conv1D)
                if (shape[::-1] if self.transposed[module] else shape) != wanted:
                    problems.add(f"{module}: the adapter is for {list(wanted)}, the base has {list(shape)}")
                if adapter.kind == "quantized" and not self.is_packed(module):
                    problems.add(f"{module}: the adapter is quantisation-aware and this linear of the base is float")

    @property
    def any_packed(self) -> bool:
        """Whether any adapted weight is quantised."""
        return any(self.is_packed(module) for module in self.names)

    def is_packed(self, module: str) -> bool:
        """Return whether a module's weight is quantised."""
        return self.packed is not None and self.names[module] in self.packed.shapes

    def stored_name(self, module: str) -> str:
        """Return the tensor on disk that merging overwrites."""
        name = self.names[module]
        return self.packed.codes_name(name) if self.packed is not None and self.is_packed(module) else name

    def merged(self, module: str, low: LowRank) -> Merged:
        """Return the merged weight; a dense adapter on a quantised base is rounded onto the base's grid."""
        name, kind = self.names[module], self.adapter.kind
        if self.packed is not None and self.is_packed(module):
            weight, mask = self.quantized(module), self.mask(module)
            packed_mask = None if mask is None or kind == "dense" else pack_mask(mask)
            codes = self._made(effective_codes, weight, low, packed_mask)
            stored = self.packed.scheme.encode_codes(codes)
            return Merged.compare(
                self.stored_name(module), stored, weight.codes(), codes, weight.grid.zero_codes(), mask
            )
        before = self.checkpoint.read(name)
        mask = self.mask(module)
        assert mask is not None
        before_OI = before.T if self.transposed[module] else before
        merged = self._made(effective_weight, before_OI, low, None if kind == "dense" else pack_mask(mask))
        if self.transposed[module]:
            merged = merged.T
        return Merged.compare(name, merged, before, merged, 0, self.promised(module))

    def _made(
        self,
        make: Callable[..., torch.Tensor],
        weight: torch.Tensor | QuantizedWeight,
        low: LowRank,
        mask_packed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what the adapter makes of a weight, on the CPU; computed on the device where that repeats its bits."""
        factors = low.lora_A, low.lora_B
        if self.device is not None:
            weight, factors = weight.to(self.device), (low.lora_A.to(self.device), low.lora_B.to(self.device))
            mask_packed = None if mask_packed is None else mask_packed.to(self.device)
        return make(weight, *factors, low.scaling, mask_packed, ordered=self.adapter.ordered).cpu()

    def quantized(self, module: str) -> QuantizedWeight:
        """Return a module's quantised weight with the adapter's starting point."""
        assert self.packed is not None
        name = self.names[module]
        codes, grid = self.packed.read(name)
        start = str(self.adapter.config["start"]) if self.adapter.kind == "quantized" else "dequantized"
        return QuantizedWeight(pack_codes(codes, grid.bits), grid, self._dtype, load_start(self.base, name, start))

    def mask(self, module: str, *, transpose: bool = True) -> torch.Tensor | None:
        """Return the mask: the base's stored one, else a float base's exact zeros, else what the adapter says.

        Args:
            module: an adapted module.
            transpose: as [O, I] for a Conv1D too; False is the layout on disk.
        """
        name = self.names[module]
        mask = load_mask(self.base, name)
        if mask is None and self.packed is not None and self.is_packed(module):
            codes, grid = self.packed.read(name)
            return codes != grid.zero_codes() if self.adapter.config.get("derive_mask") else None
        if mask is None:
            mask = self.checkpoint.read(name) != 0
        return mask.T.contiguous() if transpose and self.transposed[module] else mask

    def promised(self, module: str) -> torch.Tensor | None:
        """Return the mask outside which weights must stay zero, in the layout on disk; None where nothing must.

        A mask that is stored is such a promise, and so are the zeros of a float base that has many. The few zeros of
        one that was never pruned are not, nor are the codes of a quantised base without a mask: any weight may have
        the zero point's.
        """
        mask = self.mask(module, transpose=False)
        if mask is None or load_mask(self.base, self.names[module]) is not None or self.is_packed(module):
            return mask
        zeros = mask.numel() - int(mask.count_nonzero())
        return mask if zeros >= SPARSE_FROM * mask.numel() else None
