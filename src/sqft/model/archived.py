"""Linears of an archive that stay in its layout in memory: a bit a weight, and the kept values or codes in order.

For decoding on a CPU: a few rows are multiplied with them as they are, for many the weight is written out for the one
product (:mod:`sqft.kernels.decode`), or once for all of an evaluation. They hold no weight to train; who adapts a model
opens the archive with `packed`. Which linears: BF16 and 4-bit ones that the archive packed, in models of bfloat16 whose
tensors on disk are parameters as they are. All else is opened as from a plain folder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

from sqft.core.grid import Grid
from sqft.core.sparse import Bitmask, from_bitmask
from sqft.kernels import decode
from sqft.model.names import DiskNames
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint, quantization_config
from sqft.storage.layouts import Packed, bitmask_of, shape_of

if TYPE_CHECKING:
    from pathlib import Path

_PARTS = ("values", "mask", "ends", "scale", "zero")


class ArchivedLinear(nn.Linear):
    """A frozen linear over a weight in the bitmask layout; see :class:`sqft.kernels.decode.Stored`.

    Attributes:
        values, mask, ends, scale, zero: the stored weight's, as parameters without gradient; the last two of codes.
        scale_dtype: of the scales.
        cached: the weight while :func:`sqft.adapters.cached.cached_weights` is in force, else None.
    """

    cached: torch.Tensor | None = None

    def __init__(self, linear: nn.Linear) -> None:
        """Take a linear's place; :meth:`fill` gives the weight."""
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias
        self.scale_dtype = torch.bfloat16
        self._kept: decode.Stored | None = None  # making it takes as long as a small product

    def fill(self, stored: decode.Stored) -> None:
        """Take the weight."""
        self.scale_dtype = stored.scale_dtype
        for name in _PARTS:
            part = getattr(stored, name)
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))

    @property
    def stored(self) -> decode.Stored:
        """The weight as it is stored."""
        if self._kept is None or self._kept.values is not self._parameters["values"]:
            parts = {name: getattr(self, name) for name in _PARTS}
            shape = (self.out_features, self.in_features)
            self._kept = decode.Stored(shape, **parts, scale_dtype=self.scale_dtype)
        return self._kept

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight [O, I] in bfloat16, made anew, on any device."""
        stored = self.stored
        if stored.values.device.type == "cpu" and decode.available():
            return stored.weight()
        return unpacked(stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + bias."""
        if (self.cached is None or decode.few(x)) and decode.takes(x):
            return self.stored.linear(x, self.bias)
        weight = self.weight if self.cached is None else self.cached
        return functional.linear(x, weight.to(x.dtype), self.bias)


def unpacked(stored: decode.Stored) -> torch.Tensor:
    """Return the weight [O, I] of a sparse form in bfloat16, by PyTorch alone."""
    assert stored.mask is not None and stored.ends is not None
    packed = Bitmask(stored.mask, stored.values[: int(stored.ends[-1])], stored.ends)
    if stored.scale is None or stored.zero is None:
        zeros = torch.zeros(stored.shape, dtype=torch.int16, device=stored.values.device)
        return from_bitmask(packed, zeros).view(torch.bfloat16)
    grid = Grid(stored.scale.view(stored.scale_dtype), stored.zero, 4, stored.shape[1], False)
    codes = from_bitmask(packed, grid.zero_codes(), group=grid.group_size)
    return grid.dequantize(codes, torch.bfloat16)


class Archived:
    """The linears of an archive that can stay as they are.

    Attributes:
        linears: {stored weight: module}.
        without: the stored tensors that belong to them.
        rest: whether other quantised weights are left.
    """

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False) -> None:
        from sqft.model.targets import skeleton

        self.checkpoint = Checkpoint(folder)
        self.quantized = None if quantization_config(folder) is None else PackedCheckpoint(folder)
        self.linears: dict[str, str] = {}
        self.without: set[str] = set()
        self.rest = self.quantized is not None
        if self.checkpoint.dtype != torch.bfloat16:
            return
        network = skeleton(folder, trust_remote_code=trust_remote_code)
        parts = {} if self.quantized is None else self.quantized.stored_names()
        names = DiskNames(network, self.checkpoint, skip=parts)
        users: dict[int, int] = {}
        for _, parameter in network.named_parameters(remove_duplicate=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
        for weight in self.checkpoint.entries if self.quantized is None else self.quantized.shapes:
            place = names.parameter(weight)
            module, _, name = place.rpartition(".")
            as_it_is = place == weight or place.endswith(f".{weight}")  # transformers does not convert it
            linear = network.get_submodule(module) if as_it_is and name == "weight" else None
            if type(linear) is nn.Linear and users[id(linear.weight)] == 1 and self._stays(weight, linear):
                self.linears[weight] = module
        if self.quantized is None:
            self.without = set(self.linears)
        else:
            self.without = {part for part, weight in parts.items() if weight in self.linears}
            self.rest = len(self.linears) < len(self.quantized.shapes)

    def _stays(self, weight: str, linear: nn.Linear) -> bool:
        """Return whether the kernel takes a weight as it lies in the archive."""
        packed = self.checkpoint.packed(self._name(weight), read=False)
        if packed is None or packed.layout not in ("bitmask", "2:4"):
            return False
        shape = self.checkpoint.entries[self._name(weight)].shape
        if shape_of(shape, packed.codes) != (linear.out_features, linear.in_features):
            return False
        if packed.codes is None:
            return self.quantized is None and self.checkpoint.entries[weight].dtype == torch.bfloat16
        zero = torch.empty(1, linear.in_features // packed.codes.group, device="meta")
        stored = decode.Stored((1, linear.in_features), zero, mask=zero, zero=zero)
        return packed.codes.bits == 4 and stored.fits

    def _name(self, weight: str) -> str:
        return weight if self.quantized is None else self.quantized.codes_name(weight)

    def fill(self, model: nn.Module) -> None:
        """Give a model's linears their weights, one at a time."""
        for weight, module in self.linears.items():
            cast("ArchivedLinear", model.get_submodule(module)).fill(self._stored(weight))

    def _stored(self, weight: str) -> decode.Stored:
        name = self._name(weight)
        packed, shape = cast("Packed", self.checkpoint.packed(name)), self.checkpoint.entries[name].shape
        matrix = shape_of(shape, packed.codes)
        made = bitmask_of(packed, matrix)
        found = made.values_K.view(torch.uint8)
        values = functional.pad(found, (0, decode.SLACK)).view(made.values_K.dtype)
        stored = decode.Stored(matrix, values, made.mask_OW, made.offsets_O)
        if self.quantized is None:
            return stored
        grid = self.quantized.grid(weight)
        scale = grid.scale_OG.clone(memory_format=torch.contiguous_format)
        return replace(stored, scale=scale.view(torch.uint8), zero=grid.zero_OG.contiguous(), scale_dtype=scale.dtype)
