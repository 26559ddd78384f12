"""Adapters as PEFT layers; with config.py the only file that touches PEFT's private hooks.

`get_peft_model`, `Trainer`, TRL's `SFTTrainer`, `save_pretrained`, `merge_and_unload` and `disable_adapter` work
unpatched on them. Private hooks used: `LoraConfig._custom_modules`, the constructor of `peft.tuners.lora.layer.Linear`,
`PEFT_TYPE_TO_CONFIG_MAPPING`, and a check around `LoraModel._create_and_replace`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sqft.core.delta import MaskedLinear, effective_codes, effective_weight, project
from sqft.core.grid import QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask
from sqft.errors import InputError
from sqft.model.packed import PackedLinear
from sqft.storage.identity import check_identity
from sqft.storage.masks import load_mask, load_start

if TYPE_CHECKING:
    from peft import LoraConfig

    from sqft.adapters.config import SqftConfig

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SqftLinear(LoraLinear):
    """A linear with a dense or masked, fixed or elastic low-rank delta.

    dense: y = base(x) + scaling · B A x. sparse: y = x W'ᵀ + bias with W' from :func:`effective_weight`, in one matmul;
    quantized: the same with Ŵ', on the base's own scales and zero points.

    Dropout of kinds sparse and quantized drops input columns of A, one draw a micro-batch: dropping single tokens'
    inputs would need a second matmul. Differs from LoRA in this alone; the expectation is the same.

    Attributes:
        mask_packed: bits of the base's mask; from the base's mask file, else once from a float base's exact zeros.
        start: where quantisation-aware training starts; see :class:`sqft.core.grid.QuantizedWeight`.
        drawn_rank: what training uses when elastic; set for every optimiser step by a callback.
        fixed_rank: what evaluation and merging use; None is the maximal rank. Saving writes all ranks.
        cached: the effective weight while :func:`sqft.adapters.cached.cached_weights` is in force, else None.
    """

    mask_packed: torch.Tensor | None
    start: torch.Tensor | None
    cached: torch.Tensor | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SqftConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        """See PEFT's layer; `config` carries kind and ranks."""
        is_conv1d = isinstance(base_layer, Conv1D)
        if not isinstance(base_layer, PackedLinear) and getattr(base_layer, "weight", None) is None:
            folder = config.base_model_name_or_path or "FOLDER"
            raise InputError(
                f"{kwargs.get('target_name', '')}: the model was opened by transformers, whose compressed linears have "
                f"no weight to adapt; open it with sqft.load_model({folder!r}, packed=True), or with its adapter by "
                f"sqft.load_model({folder!r}, ADAPTER)"
            )
        super().__init__(
            base_layer,
            adapter_name,
            config,
            r=r,
            lora_alpha=cast("int", lora_alpha),
            is_target_conv_1d_layer=is_conv1d,
            **kwargs,
        )
        self.fan_in_fan_out = is_conv1d
        self.kind = config.kind
        self._shared = _shared(config)
        self.elastic = config.ranks is not None and len(set(config.ranks)) > 1
        self.drawn_rank: int | None = None
        self.fixed_rank: int | None = None
        self._base_weight: torch.Tensor | None = None
        name = kwargs.get("target_name", "")
        packed = isinstance(base_layer, PackedLinear)
        if self.kind != "dense" and not packed and base_layer.weight.dtype not in _FLOATS:
            raise InputError(
                f"{name}: its weight is stored as {base_layer.weight.dtype}, by a quantiser that sqft does not know; "
                f"kind {self.kind} needs float16, bfloat16 or float32, or a base that sqft.load_model opened packed"
            )
        if self.kind == "sparse" and packed:
            raise InputError(
                f"{name}: kind sparse needs a float base, and this one is quantised; use kind quantized, or dense"
            )
        if self.kind == "quantized" and not packed:
            raise InputError(
                f"{name}: kind quantized needs a quantised base, and this linear is float; quantise it with sqft "
                "quantize, load it with sqft.load_model(FOLDER, packed=True), or use kind sparse"
            )
        # The folder that the linear was read from, where it knows it: the one in the config may have moved.
        base = base_layer.folder if isinstance(base_layer, PackedLinear) else config.base_model_name_or_path
        start = None
        if self.kind == "quantized":
            start = load_start(base, f"{name}.weight", config.start)
        if start is not None and start.shape != self.weight_shape:
            raise InputError(f"{name}: its starting weight has shape {list(start.shape)}, not {self.weight_shape}")
        device = next(base_layer.parameters()).device
        self.register_buffer("start", None if start is None else start.to(device), persistent=False)
        mask = None if self.kind == "dense" else self._find_mask(config, base, name)
        self.register_buffer("mask_packed", mask, persistent=False)

    @property
    def weight_OI(self) -> torch.Tensor | QuantizedWeight:
        """The base's weight as [O, I]; a quantised one with its starting point."""
        base = self.get_base_layer()
        if isinstance(base, PackedLinear):
            return replace(base.quantized, start=self.start)
        weight = cast(torch.Tensor, base.weight)
        return weight.T if self.fan_in_fan_out else weight

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base's weight multiplies in."""
        base = self.get_base_layer()
        return base.dtype if isinstance(base, PackedLinear) else cast(torch.Tensor, base.weight).dtype

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(O, I)."""
        return cast("int", self.out_features), cast("int", self.in_features)

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; one of other settings is refused, since it would run with this layer's mask and start."""
        config = kwargs.get("config")
        settings = _shared(config)
        base = self.get_base_layer()
        if settings["kind"] == "quantized" and isinstance(base, PackedLinear) and base.folder is not None:
            trained_on = cast("SqftConfig", config).base_identity
            if trained_on is not None:
                check_identity(base.folder, trained_on, settings["start"])
        if hasattr(self, "_shared") and settings != self._shared:
            differing = [f"{key} {value!r}, not {self._shared[key]!r}" for key, value in settings.items()
                         if value != self._shared[key]]  # fmt: skip
            raise InputError(
                f"adapter {adapter_name} has {'; '.join(differing)} as the model's first adapter has; load each on a "
                "model of its own"
            )
        super().update_layer(adapter_name, r, *args, **kwargs)

    def _find_mask(self, config: SqftConfig, folder: str | Path | None, name: str) -> torch.Tensor | None:
        stored = load_mask(folder, f"{name}.weight")
        base = self.get_base_layer()
        if stored is None and isinstance(base, PackedLinear):
            codes, zeros = base.quantized.codes(), base.quantized.grid.zero_codes()
            return pack_mask(codes != zeros) if config.derive_mask else None
        if stored is None:
            return pack_mask(cast(torch.Tensor, self.weight_OI) != 0)
        if self.fan_in_fan_out:
            stored = stored.T.contiguous()
        if stored.shape != self.weight_OI.shape:
            raise InputError(
                f"{name}: its stored mask has shape {list(stored.shape)}, its weight {list(self.weight_OI.shape)}"
            )
        weight = self.weight_OI
        if isinstance(weight, torch.Tensor) and bool((weight[~stored.to(weight.device)] != 0).any()):
            raise InputError(
                f"{name}: the mask of {folder} keeps weights at zero that this model has otherwise; it is another "
                "base, load the one that the adapter was trained on"
            )
        return pack_mask(stored).to(weight.device)

    def active_rank(self, adapter: str) -> int:
        """Return the rank in force.

        Raises:
            RuntimeError: an elastic layer trains and nobody drew its rank for this step.
        """
        maximal: int = self.r[adapter]
        if not self.training:
            return self.fixed_rank or maximal
        if not self.elastic:
            return maximal
        if self.drawn_rank is None:
            raise RuntimeError(
                "an elastic adapter is training but no rank was drawn for this step; add "
                "sqft.ElasticRanks(seed) to the trainer's callbacks"
            )
        return self.drawn_rank

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A [r, I], B [O, r]) at the rank in force, as views."""
        rank = self.active_rank(adapter)
        lora_A, lora_B = self._full_factors(adapter)
        return lora_A[:rank], lora_B[:, :rank]

    def _full_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        return cast(torch.Tensor, self.lora_A[adapter].weight), cast(torch.Tensor, self.lora_B[adapter].weight)

    def _merged_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A, B) at the rank of evaluation, also where the layer is in training mode."""
        lora_A, lora_B = self._full_factors(adapter)
        return lora_A[: self.fixed_rank], lora_B[:, : self.fixed_rank]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the base with the active adapter; see the class."""
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names: an adapter for each row is not supported; activate one for all rows")
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return cast("torch.Tensor", self.base_layer(x, *args, **kwargs))
        if self.cached is not None:
            bias = cast("torch.Tensor | None", self.get_base_layer().bias)
            return project(x, self.cached, bias, transposed=self.fan_in_fan_out)
        if self.kind == "dense":
            return self._forward_dense(x, active)
        if len(active) > 1:
            raise InputError(f"{len(active)} masked adapters are active ({', '.join(active)}); activate one")
        (adapter,) = active
        lora_A, lora_B = self.factors(adapter)
        dropout = self.lora_dropout[adapter]
        if self.training and isinstance(dropout, nn.Dropout):
            lora_A = lora_A * dropout(lora_A.new_ones(1, lora_A.shape[1]))
        base = self.get_base_layer()
        weight = self.weight_OI if isinstance(base, PackedLinear) else base.weight
        result = MaskedLinear.apply(
            x, weight, base.bias, lora_A, lora_B, self.scaling[adapter], self.mask_packed, self.fan_in_fan_out
        )
        return cast("torch.Tensor", result)

    def effective(self) -> torch.Tensor:
        """Return W' (or Ŵ') [O, I] of the active adapter at the rank in force, in the base's dtype."""
        (adapter,) = [name for name in self.active_adapters if name in self.lora_A]
        lora_A, lora_B = self.factors(adapter)
        return effective_weight(self.weight_OI, lora_A, lora_B, self.scaling[adapter], self.mask_packed)

    def _forward_dense(self, x: torch.Tensor, active: list[str]) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        for adapter in active:
            lora_A, lora_B = self.factors(adapter)
            inputs = self.lora_dropout[adapter](self._cast_input_dtype(x, lora_A.dtype))
            result = result + functional.linear(functional.linear(inputs, lora_A), lora_B) * self.scaling[adapter]
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Assign W' to the base; the base's own tensor is kept for :meth:`unmerge`.

        PEFT adds the delta in the base's dtype, which differs from the live weight in 4 % of bfloat16 entries.

        Args:
            safe_merge: refuse a weight that is not finite.
            adapter_names: which adapters; None is the active ones.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if self.kind != "dense" and len(names) + len(self.merged_adapters) > 1:
            raise InputError(
                f"masked adapters merge one at a time, and {', '.join([*self.merged_adapters, *names])} are asked for; "
                "each was trained on the base alone"
            )
        for adapter in names:
            base = self.get_base_layer()
            lora_A, lora_B = self._merged_factors(adapter)
            if safe_merge and not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
                raise ValueError(f"the adapter {adapter} has NaN or Inf and seems to be broken")
            if isinstance(base, PackedLinear):
                self._merge_codes(base, lora_A, lora_B, self.scaling[adapter])
            else:
                weight = cast(torch.Tensor, self.weight_OI)
                merged = effective_weight(weight, lora_A, lora_B, self.scaling[adapter], self.mask_packed)
                if self._base_weight is None:
                    self._base_weight = cast(torch.Tensor, base.weight).data
                base.weight.data = merged.T if self.fan_in_fan_out else merged
            self.merged_adapters.append(adapter)

    def _merge_codes(self, base: PackedLinear, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> None:
        if self.kind == "dense":
            raise InputError(
                "a dense adapter cannot be merged into a quantised base without loss: the sum is not on the base's "
                "grid. Train with kind quantized, serve the adapter unmerged, or use sqft merge with "
                "merge.allow_precision_loss"
            )
        weight = cast(QuantizedWeight, self.weight_OI)
        codes = effective_codes(weight, lora_A, lora_B, scaling, self.mask_packed)
        if self._base_weight is None:
            self._base_weight = base.packed.data
        base.packed.data = pack_codes(codes, base.bits)

    def unmerge(self) -> None:
        """Put the base's own tensor back, bit for bit."""
        if self._base_weight is not None:
            base = self.get_base_layer()
            if isinstance(base, PackedLinear):
                base.packed.data = self._base_weight
            else:
                base.weight.data = self._base_weight
            self._base_weight = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return W' - W in float32, in the base's own layout."""
        lora_A, lora_B = self._merged_factors(adapter)
        base = self.weight_OI
        if isinstance(base, QuantizedWeight) and self.kind == "quantized":
            after = effective_weight(base, lora_A, lora_B, self.scaling[adapter], self.mask_packed)
            return after.float() - cast(torch.Tensor, self.get_base_layer().weight).float()
        zero = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
        delta = effective_weight(zero, lora_A, lora_B, self.scaling[adapter], self.mask_packed)
        return delta.T if self.fan_in_fan_out else delta


def _shared(config: Any) -> dict[str, Any]:
    """Return what all adapters of a layer must agree in: they have one mask, one start and one set of ranks."""
    kind = getattr(config, "kind", "dense")
    ranks = getattr(config, "ranks", None)
    quantized = kind == "quantized"
    return {
        "kind": kind,
        "ranks": None if ranks is None else sorted(set(ranks)),
        "start": config.start if quantized else None,
        "derive_mask": config.derive_mask if quantized else None,
    }


def _refuse_stock_layers(create: Any) -> Any:
    """Let a masked adapter not be added to PEFT's own layers, which would run it as plain LoRA without a word."""

    @wraps(create)
    def checked(tuner: LoraModel, config: LoraConfig, name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        kind = getattr(config, "kind", "dense")
        if hasattr(config, "kind") and kwargs.get("parameter_name"):
            raise InputError(
                f"adapter {name} is of kind {kind}, and PEFT takes one of its target_modules for the parameter "
                f"{kwargs['parameter_name']} of a {type(target).__name__}, which is no linear; take it out"
            )
        if kind != "dense" and isinstance(target, LoraLayer) and not isinstance(target, SqftLinear):
            raise InputError(
                f"adapter {name} is of kind {kind}, and the model has a plain LoRA already, whose layers have no mask; "
                "load each on a model of its own"
            )
        create(tuner, config, name, target, *args, **kwargs)

    return checked


LoraModel._create_and_replace = _refuse_stock_layers(LoraModel._create_and_replace)  # type: ignore[method-assign]


def sqft_layers(model: nn.Module) -> dict[str, SqftLinear]:
    """Return the adapted linears by the name of the linear in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SqftLinear)
    }
