"""Quantised models in memory: linears whose weights stay packed, in forward and in backward.

transformers opens the same folders, but decompresses the whole model on its first forward; training on that would take
the memory of the float model. Here a weight is dequantised when its layer runs, and again in its backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from sqft.core.delta import FrozenLinear, dequantized
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.errors import InputError
from sqft.model.opening import check_complete
from sqft.model.targets import DiskNames, skeleton
from sqft.storage.integers import PackedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedLinear(nn.Linear):
    """A frozen linear over a packed weight.

    Attributes:
        packed: codes, uint8; see :func:`sqft.core.grid.pack_codes`.
        scale_bits: the scales [O, G] as integers of their width, which `model.to(dtype)` leaves alone: rounded to
            another dtype they would be another grid.
        zero_point: uint8 [O, G].
        folder: the model folder that the weight was read from.
        cached: the dequantised weight while :func:`sqft.adapters.cached.cached_weights` is in force, else None.
    """

    packed: torch.Tensor
    scale_bits: torch.Tensor
    zero_point: torch.Tensor
    cached: torch.Tensor | None = None

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None = None, folder: str | Path | None = None
    ) -> None:
        """Take a weight; `bias` is [O] or None."""
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.out_features, self.in_features = weight.shape
        self.bits, self.symmetric, self.dtype = weight.grid.bits, weight.grid.symmetric, weight.dtype
        self.folder, self.scale_dtype = folder, weight.grid.scale_OG.dtype
        integers = {2: torch.int16, 4: torch.int32}[self.scale_dtype.itemsize]
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale_bits", weight.grid.scale_OG.contiguous().view(integers))
        self.register_buffer("zero_point", weight.grid.zero_OG)
        self.bias = cast("nn.Parameter", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def quantized(self) -> QuantizedWeight:
        """The packed weight."""
        scale = self.scale_bits.view(self.scale_dtype)
        grid = Grid(scale, self.zero_point, self.bits, self.in_features, self.symmetric)
        return QuantizedWeight(self.packed, grid, self.dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantised weight [O, I], made anew."""
        return dequantized(self.quantized)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Ŵᵀ + bias."""
        if self.cached is not None:
            return functional.linear(x, self.cached, self.bias)
        return cast("torch.Tensor", FrozenLinear.apply(x, self.quantized, self.bias))


def load_packed_model(
    folder: str | Path, *, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return a quantised folder's model with packed linears, in evaluation mode.

    Args:
        folder: in a format of :mod:`sqft.storage.integers`.
        attention: attention implementation; None leaves transformers' choice.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the folder cannot be read, or lacks weights of the model.
    """
    packed = PackedCheckpoint(folder)
    model = skeleton(folder, attention=attention, trust_remote_code=trust_remote_code)
    names = DiskNames(model, packed.checkpoint, skip=packed.stored_names())
    dtype = model.dtype
    modules = dict(model.named_modules())
    for weight in packed.shapes:
        module = names.parameter(weight).removesuffix(".weight")
        linear = modules.get(module)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"model {folder}: {weight} is quantised, but the model has no linear {module}")
        codes, grid = packed.read(weight)
        replacement = PackedLinear(QuantizedWeight(pack_codes(codes, grid.bits), grid, dtype), folder=folder)
        replacement.bias = linear.bias
        model.set_submodule(module, replacement)
    _untie(model)
    names.load("")
    # As from_pretrained does: what is stored twice, with two contents, is not tied, whatever the config says.
    model.tie_weights({name for name, parameter in model.named_parameters() if parameter.is_meta}, False)
    check_complete(folder, [name for name, parameter in model.named_parameters() if parameter.is_meta])
    model.requires_grad_(False)
    if (Path(folder) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained = _refuse_saving  # type: ignore[method-assign]
    model.eval()
    return model


def _untie(model: PreTrainedModel) -> None:
    """Give tied parameters tensors of their own, so that each gets what is stored under its name."""
    for name in model.all_tied_weights_keys:
        parent, _, last = name.rpartition(".")
        tied = model.get_parameter(name)
        setattr(model.get_submodule(parent), last, nn.Parameter(torch.empty_like(tied), requires_grad=False))


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise InputError(
        "a model with packed linears is not saved from memory: its tensors are in an order of ours that no other tool "
        "reads. Save the adapter and merge it on disk with sqft merge, which writes a standard folder"
    )
