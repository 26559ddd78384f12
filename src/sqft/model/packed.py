"""A linear whose quantised weight stays packed in memory, in forward and in backward.

The weight is dequantised when the layer runs, and again in its backward, so training holds no float copy of it. Without
gradient a few rows are multiplied with the codes as they are, where that is possible (:mod:`sqft.kernels.decode`).
Codes, scales and zero points are parameters of bytes without gradient: DistributedDataParallel broadcasts them and
FSDP2 shards them as it does any parameter, optimisers are not given them, and `model.to(dtype)` casts floats alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

from sqft.core.delta import FrozenLinear, dequantized
from sqft.core.grid import Grid, QuantizedWeight, storage_bits
from sqft.kernels import decode

if TYPE_CHECKING:
    from pathlib import Path


class PackedLinear(nn.Linear):
    """A frozen linear over a packed weight.

    Attributes:
        packed: codes, uint8 [O, W]; see :func:`sqft.core.grid.pack_codes`.
        scale_bytes: the bytes of the scales [O, G], uint8 [O, G · itemsize]: rounded to another dtype they would be
            another grid.
        zero_point: uint8 [O, G].
        folder: the model folder that the weight was read from.
        cached: the dequantised weight while :func:`sqft.adapters.cached.cached_weights` is in force, else None.
    """

    packed: nn.Parameter
    scale_bytes: nn.Parameter
    zero_point: nn.Parameter
    cached: torch.Tensor | None = None
    _kept: decode.Stored | None = None

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None = None, folder: str | Path | None = None
    ) -> None:
        """Take a weight; `bias` is [O] or None."""
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.out_features, self.in_features = weight.shape
        self.bits, self.symmetric, self.dtype = weight.grid.bits, weight.grid.symmetric, weight.dtype
        self.folder, self.scale_dtype = folder, weight.grid.scale_OG.dtype
        for name, value in stored_bytes(weight.packed, weight.grid).items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.bias = cast("nn.Parameter", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def quantized(self) -> QuantizedWeight:
        """The packed weight."""
        scale = self.scale_bytes.view(self.scale_dtype)
        grid = Grid(scale, self.zero_point, self.bits, self.in_features, self.symmetric)
        return QuantizedWeight(self.packed, grid, self.dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantised weight [O, I], made anew."""
        return dequantized(self.quantized)

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, under the name that PEFT asks a quantised linear's device of instead of `weight`."""
        return self.packed

    @property
    def stored(self) -> decode.Stored | None:
        """The codes as the kernel for decoding takes them; None where it does not."""
        if self._kept is None or self._kept.values is not self._parameters["packed"]:
            shape, scale = (self.out_features, self.in_features), self.scale_bytes
            self._kept = decode.Stored(
                shape, self.packed, scale=scale, zero=self.zero_point, scale_dtype=self.scale_dtype
            )
        kept = self._kept
        bfloat16 = self.dtype == torch.bfloat16 and kept.values.device.type == "cpu"
        return kept if bfloat16 and storage_bits(self.bits) == 4 and kept.fits else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ + bias."""
        worth = self.cached is None or decode.few(x)
        if worth and decode.takes(x) and (stored := self.stored) is not None:
            return stored.linear(x, self.bias)
        if self.cached is not None:
            return functional.linear(x, self.cached, self.bias)
        return cast("torch.Tensor", FrozenLinear.apply(x, self.quantized, self.bias))


def stored_bytes(packed: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """Return the tensors of a packed linear by their parameters' names, all uint8.

    Args:
        packed: codes from :func:`sqft.core.grid.pack_codes`.
        grid: scales and zero points [O, G].
    """
    # Not contiguous(): one column may count as contiguous with a stride that bytes cannot be viewed through.
    scale = grid.scale_OG.clone(memory_format=torch.contiguous_format)
    return {"packed": packed, "scale_bytes": scale.view(torch.uint8), "zero_point": grid.zero_OG}
