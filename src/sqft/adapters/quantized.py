"""A quantised linear that trains on its own grid, through the rounding.

    y = x Ŵ'ᵀ + bias        Ŵ' = s · (q − z)
    q = clamp(round((W_start + scaling · (B A) ⊙ M) / s) + z, 0, 2ⁿ − 1)        (QA-SparsePEFT: SQFT, equations 3 and 4)

s and z are the quantised base's. Merging writes the codes q of the forward, so merged outputs are equal to the bit.
W_start is what `start` of the configuration says; M is the stored mask, or the codes other than the zero point where
`derive_mask` asks for it, and else the delta is unmasked: many codes of a base that was never pruned are zero points.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from sqft.adapters.masked import SqftMaskedLinear
from sqft.core.delta import effective_codes, effective_weight
from sqft.core.grid import QuantizedWeight, pack_codes
from sqft.errors import InputError
from sqft.model.packed import PackedLinear
from sqft.storage.identity import check_identity
from sqft.storage.masks import load_start

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.adapters.config import SqftConfig


class SqftQuantizedLinear(SqftMaskedLinear):
    """A linear of kind quantized, on a :class:`~sqft.model.packed.PackedLinear`.

    Attributes:
        start_bytes: the bytes of :attr:`start`, uint8: `model.to(dtype)` would round a start of floats.
    """

    kind: ClassVar[str] = "quantized"
    start_bytes: torch.Tensor | None

    def read_base(self, config: SqftConfig, name: str) -> None:
        """As in the base class, and the start."""
        super().read_base(config, name)
        start = load_start(self.base_folder(config), f"{name}.weight", config.start)
        if start is not None and tuple(start.shape) != self.weight_shape:
            raise InputError(f"{name}: its starting weight has shape {list(start.shape)}, not {self.weight_shape}")
        self._start_dtype = torch.int8 if start is None else start.dtype
        self.freeze("start_bytes", None if start is None else start.to(self.base_device).view(torch.uint8))

    @property
    def start(self) -> torch.Tensor | None:
        """Where training starts; see :class:`sqft.core.grid.QuantizedWeight`."""
        return None if self.start_bytes is None else self.start_bytes.view(self._start_dtype)

    def check_precision(self, name: str) -> None:
        """Refuse a base that is not packed."""
        if not isinstance(self.get_base_layer(), PackedLinear):
            self.check_dtype(name)
            raise InputError(
                f"{name}: kind quantized needs a quantised base, and this linear is float; quantise it with sqft "
                "quantize, load it with sqft.load_model(FOLDER, packed=True), or use kind sparse"
            )

    def base_folder(self, config: SqftConfig) -> str | Path | None:
        """Return the folder that the linear was read from; the one in the configuration may have moved."""
        return self._packed().folder

    @classmethod
    def shared_settings(cls, config: Any) -> dict[str, Any]:
        """As in the base class; a start and a mask are the layer's too."""
        names = ("start", "derive_mask")
        return {**super().shared_settings(config), **{name: getattr(config, name, None) for name in names}}

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """As in the base class; an adapter that was trained on another base is refused."""
        base, config = self.get_base_layer(), kwargs["config"]
        trained_on = getattr(config, "base_identity", None)
        ours = getattr(config, "kind", None) == self.kind
        if ours and trained_on is not None and isinstance(base, PackedLinear) and base.folder is not None:
            check_identity(base.folder, trained_on, config.start)
        super().update_layer(adapter_name, r, *args, **kwargs)

    def keeps_more_than(self, mask_OI: torch.Tensor) -> bool:
        """Return False: the identity of the base is compared instead, mask included."""
        return False

    def derived_mask(self, config: SqftConfig) -> torch.Tensor | None:
        """Return where the codes differ from the zero point if the configuration asks for it, else None."""
        base = self._packed().quantized
        return base.codes() != base.grid.zero_codes() if config.derive_mask else None

    def _packed(self) -> PackedLinear:
        return cast(PackedLinear, self.get_base_layer())

    @property
    def weight_OI(self) -> QuantizedWeight:
        """The base's weight with its starting point."""
        return replace(self._packed().quantized, start=self.start)

    def merged_tensor(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the packed codes of Ŵ'."""
        codes = effective_codes(self.weight_OI, lora_A, lora_B, scaling, self.mask_packed, ordered=self.ordered)
        return pack_codes(codes, self._packed().bits)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return Ŵ' - Ŵ in float32."""
        given = (*self.merged_factors(adapter), self.scaling[adapter], self.mask_packed)
        after = effective_weight(self.weight_OI, *given, ordered=self.ordered)
        return after.float() - self._packed().weight.float()
