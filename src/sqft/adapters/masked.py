"""A float linear whose low-rank delta leaves the base's zeros zero.

    y = x W'ᵀ + bias        W' = W + scaling · (B A) ⊙ M        (SparsePEFT: SQFT, equations 1 and 2)

One matmul with W', computed in forward and again in backward (:mod:`sqft.core.delta`). Merging assigns the
W' of the forward, so merged outputs are equal to the bit.

Dropout drops input columns of A, one draw a micro-batch: dropping single tokens' inputs would need a second matmul.
Differs from LoRA in this alone; the expectation is the same.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from sqft.adapters.layers import SqftLinear
from sqft.core.delta import MaskedLinear, effective_weight, project
from sqft.core.mask import pack_mask
from sqft.errors import InputError
from sqft.model.packed import PackedLinear
from sqft.storage.masks import load_mask

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.adapters.config import SqftConfig
    from sqft.core.grid import QuantizedWeight

_LOG = logging.getLogger(__name__)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SqftMaskedLinear(SqftLinear):
    """A linear of kind sparse, and the base of kind quantized. The mask: the stored one, else W's exact zeros."""

    kind: ClassVar[str] = "sparse"

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """As in the base; stock layers have no such entry, so that PEFT refuses them a masked adapter."""
        return {("needs_sqft_layers",): None}

    @classmethod
    def shared_settings(cls, config: Any) -> dict[str, Any]:
        """As in the base class; a layer's weight is computed in one arithmetic."""
        return {**super().shared_settings(config), "arithmetic": getattr(config, "arithmetic", None)}

    def read_base(self, config: SqftConfig, name: str) -> None:
        """Take the mask; see the base class."""
        self.check_precision(name)
        folder = self.base_folder(config)
        mask = self.stored_mask(folder, name)
        if mask is None:
            mask = self.derived_mask(config)
        elif self.keeps_more_than(mask):
            raise InputError(
                f"{name}: the mask of {folder} keeps weights at zero that this model has otherwise; it is another "
                "base, load the one that the adapter was trained on"
            )
        self.freeze("mask_packed", None if mask is None else pack_mask(mask).to(self.base_device))

    def check_precision(self, name: str) -> None:
        """Refuse a quantised base; see :meth:`read_base`."""
        if isinstance(self.get_base_layer(), PackedLinear):
            raise InputError(
                f"{name}: kind sparse needs a float base, and this one is quantised; use kind quantized, or dense"
            )
        self.check_dtype(name)

    def check_dtype(self, name: str) -> None:
        """Refuse a weight in an unknown quantiser's dtype."""
        if self.base_dtype not in _FLOATS:
            raise InputError(
                f"{name}: its weight is stored as {self.base_dtype}, by a quantiser that sqft does not know; kind "
                f"{self.kind} needs float16, bfloat16 or float32, or a base that sqft.load_model opened packed"
            )

    def base_folder(self, config: SqftConfig) -> str | Path | None:
        """Return the folder that the base was read from."""
        return config.base_model_name_or_path

    def stored_mask(self, folder: str | Path | None, name: str) -> torch.Tensor | None:
        """Return the base's mask file's mask of this linear, bool [O, I], or None."""
        mask = load_mask(folder, f"{name}.weight")
        if mask is None:
            return None
        mask = self._in_layout(mask).contiguous()
        if tuple(mask.shape) != self.weight_shape:
            raise InputError(
                f"{name}: its stored mask has shape {list(mask.shape)}, its weight {list(self.weight_shape)}"
            )
        return mask

    def keeps_more_than(self, mask_OI: torch.Tensor) -> bool:
        """Return whether the base has weights other than zero that a mask prunes."""
        return bool((self.float_weight()[~mask_OI.to(self.base_device)] != 0).any())

    def derived_mask(self, config: SqftConfig) -> torch.Tensor | None:
        """Return the mask of a base that has none stored, bool [O, I], or None for an unmasked delta."""
        return self.float_weight() != 0

    @property
    def weight_OI(self) -> torch.Tensor | QuantizedWeight:
        """The base's weight as [O, I], for :func:`sqft.core.delta.effective_weight`."""
        return self.float_weight()

    def adapted(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        """Return x W'ᵀ + bias of the one active adapter."""
        base = self.get_base_layer()
        bias = cast("torch.Tensor | None", base.bias)
        if self.cached is not None:
            return project(x, self.cached, bias, transposed=self.fan_in_fan_out)
        if len(adapters) > 1:
            raise InputError(f"{len(adapters)} masked adapters are active ({', '.join(adapters)}); activate one")
        (adapter,) = adapters
        lora_A, lora_B = self.factors(adapter)
        dropout = self.lora_dropout[adapter]
        if self.training and isinstance(dropout, nn.Dropout):
            lora_A = lora_A * dropout(lora_A.new_ones(1, lora_A.shape[1]))
        weight = self.weight_OI
        if self.training and not self.ordered and weight.device.type == "cuda":
            _warn_of_slow_training()
        result = MaskedLinear.apply(
            x,
            self._in_layout(weight) if isinstance(weight, torch.Tensor) else weight,
            bias,
            lora_A,
            lora_B,
            self.scaling[adapter],
            self.mask_packed,
            self.fan_in_fan_out,
            self.ordered,
        )
        return cast("torch.Tensor", result)

    def effective(self) -> torch.Tensor:
        """Return W' (or Ŵ') [O, I] of the active adapter at the rank in force, in the base's dtype."""
        (adapter,) = [name for name in self.active_adapters if name in self.lora_A]
        given = (*self.factors(adapter), self.scaling[adapter], self.mask_packed)
        return effective_weight(self.weight_OI, *given, ordered=self.ordered)

    def check_merge(self, adapters: list[str]) -> None:
        """Refuse to merge more than one adapter; see the base class."""
        if len(adapters) + len(self.merged_adapters) > 1:
            raise InputError(
                f"masked adapters merge one at a time, and {', '.join([*self.merged_adapters, *adapters])} are asked "
                "for; each was trained on the base alone"
            )


@cache  # once a process, not once a forward
def _warn_of_slow_training() -> None:
    _LOG.warning(
        "an adapter of arithmetic blas trains on a GPU: each of its weights is computed on the CPU, in every forward "
        "and backward; train with SqftConfig(arithmetic='ordered')"
    )
