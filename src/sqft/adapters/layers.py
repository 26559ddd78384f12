"""A linear with a low-rank delta of fixed or elastic rank, and what every kind of layer has in common.

    y = x Wᵀ + bias + scaling · (x A[:r]ᵀ) B[:, :r]ᵀ        scaling = lora_alpha / r_max

LoRA's equation 3, with the elastic rank r of SQFT, section 2.2. This is kind dense. The masked kinds multiply once,
with W' (:mod:`sqft.adapters.masked`) or Ŵ' (:mod:`sqft.adapters.quantized`). `get_peft_model`, `Trainer`, TRL's
`SFTTrainer`, `save_pretrained`, `merge_and_unload` and `disable_adapter` work on all of them as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import skip_init_on_device
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sqft.core.delta import effective_weight
from sqft.errors import InputError
from sqft.model.archived import ArchivedLinear
from sqft.model.packed import PackedLinear

if TYPE_CHECKING:
    from sqft.adapters.config import SqftConfig


class SqftLinear(LoraLinear):
    """A linear of kind dense, and the base of the other kinds.

    Attributes:
        kind: of its :class:`~sqft.adapters.config.SqftConfig`.
        elastic: whether the adapter was given several ranks.
        drawn_rank: what training uses when elastic; set for every optimiser step by a callback.
        fixed_rank: what evaluation and merging use; None is the maximal rank. Saving writes all ranks.
        cached: the effective weight while :func:`sqft.adapters.cached.cached_weights` is in force, else None; always
            None of kind dense, whose forward has no such weight.
        mask_packed: bits of the base's mask; None where the delta is dense.
    """

    kind: ClassVar[str] = "dense"
    cached: torch.Tensor | None = None
    mask_packed: torch.Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SqftConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        """See PEFT's layer; `config` carries the ranks."""
        if isinstance(base_layer, ArchivedLinear):
            raise InputError(
                f"{kwargs.get('target_name', '')}: the model was opened to run as its archive holds it, and has no "
                "weight to adapt; open it with sqft.load_model(FOLDER, packed=True), or with its adapter by "
                "sqft.load_model(FOLDER, ADAPTER)"
            )
        if not isinstance(base_layer, PackedLinear) and getattr(base_layer, "weight", None) is None:
            folder = config.base_model_name_or_path or "FOLDER"
            raise InputError(
                f"{kwargs.get('target_name', '')}: the model was opened by transformers, whose compressed linears have "
                f"no weight to adapt; open it with sqft.load_model({folder!r}, packed=True), or with its adapter by "
                f"sqft.load_model({folder!r}, ADAPTER)"
            )
        is_conv1d = isinstance(base_layer, Conv1D)
        alpha = cast("int", lora_alpha)
        super().__init__(
            base_layer, adapter_name, config, r=r, lora_alpha=alpha, is_target_conv_1d_layer=is_conv1d, **kwargs
        )
        self.fan_in_fan_out = is_conv1d
        self._settings = self.shared_settings(config)
        self.elastic = config.ranks is not None and len(set(config.ranks)) > 1
        self.drawn_rank: int | None = None
        self.fixed_rank: int | None = None
        self._base_tensor: torch.Tensor | None = None
        self._frozen: list[str] = []
        self.read_base(config, kwargs.get("target_name", ""))

    def read_base(self, config: SqftConfig, name: str) -> None:
        """Take from the base what the layer needs beside its weight.

        Args:
            config: the first adapter's.
            name: the linear's.

        Raises:
            InputError: the base lacks what the kind needs, or has it in another shape.
        """
        self.freeze("mask_packed", None)

    @skip_init_on_device  # with low_cpu_mem_usage PEFT registers parameters without data
    def freeze(self, name: str, tensor: torch.Tensor | None) -> None:
        """Register bytes that lie with the base as a parameter without gradient, or their absence.

        DistributedDataParallel broadcasts parameters once and buffers in every forward; FSDP2 shards parameters alone.
        PEFT saves whatever a layer has in its state beside the base layer, so these are no part of the state.
        """
        self._frozen.append(name)
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._frozen:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        missing_keys[:] = [key for key in missing_keys if key.removeprefix(prefix) not in self._frozen]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The LoRA variants that the layer has, for PEFT's check: none but plain LoRA."""
        return {(): None}

    @classmethod
    def shared_settings(cls, config: Any) -> dict[str, Any]:
        """Return what all adapters of a layer must agree in: they have one mask, one start and one set of ranks."""
        ranks = getattr(config, "ranks", None)
        return {
            "kind": getattr(config, "kind", SqftLinear.kind),
            "ranks": None if ranks is None else sorted(set(ranks)),
        }

    @property
    def ordered(self) -> bool:
        """Whether the arithmetic of the adapters is the ordered one; see :mod:`sqft.core.delta`."""
        return self._settings.get("arithmetic") == "ordered"

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; one of other settings is refused, since it would run with this layer's mask and start."""
        if hasattr(self, "_settings"):  # not so for the first, which is added while the layer is built
            settings = self.shared_settings(kwargs.get("config"))
            differing = [f"{key} {value!r}, not {self._settings[key]!r}" for key, value in settings.items()
                         if value != self._settings[key]]  # fmt: skip
            if differing:
                raise InputError(
                    f"adapter {adapter_name} has {'; '.join(differing)} as the model's first adapter has; load each on "
                    "a model of its own"
                )
        super().update_layer(adapter_name, r, *args, **kwargs)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(O, I)."""
        return cast("int", self.out_features), cast("int", self.in_features)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base's weight multiplies in."""
        return cast("torch.dtype", self._get_base_layer_device_and_dtype(self.get_base_layer())[1])

    @property
    def base_device(self) -> torch.device:
        """Where the base's weight is."""
        return cast("torch.device", self._get_base_layer_device_and_dtype(self.get_base_layer())[0])

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        if isinstance(base_layer, PackedLinear):  # PEFT would dequantise its weight to look at it
            return base_layer.packed.device, base_layer.dtype
        return cast(
            "tuple[torch.device | None, torch.dtype | None]", super()._get_base_layer_device_and_dtype(base_layer)
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        if isinstance(module, PackedLinear):
            return module.in_features, module.out_features
        return super()._get_in_out_features(module)

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

    def factors(self, adapter: str, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A [r, I], B [O, r]), as views.

        Args:
            adapter: its name.
            rank: r; None is the rank in force.
        """
        rank = self.active_rank(adapter) if rank is None else rank
        return (
            cast(torch.Tensor, self.lora_A[adapter].weight)[:rank],
            cast(torch.Tensor, self.lora_B[adapter].weight)[:, :rank],
        )

    def merged_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (A, B) at the rank of evaluation, also where the layer is in training mode."""
        return self.factors(adapter, self.fixed_rank or self.r[adapter])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the base with the active adapters."""
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names: an adapter for each row is not supported; activate one for all rows")
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return cast("torch.Tensor", self.base_layer(x, *args, **kwargs))
        return self.adapted(x, active)

    def adapted(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        """Return the output with these adapters, one or more."""
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        for adapter in adapters:
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
        self.check_merge(names)
        for adapter in names:
            lora_A, lora_B = self.merged_factors(adapter)
            if safe_merge and not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
                raise ValueError(f"the adapter {adapter} has NaN or Inf and seems to be broken")
            merged = self.merged_tensor(lora_A, lora_B, self.scaling[adapter])
            stored = self._stored_tensor()
            if self._base_tensor is None:
                self._base_tensor = stored.data
            stored.data = merged
            self.merged_adapters.append(adapter)

    def check_merge(self, adapters: list[str]) -> None:
        """Refuse adapters that do not merge without loss.

        Raises:
            InputError: says which and why.
        """
        if adapters and isinstance(self.get_base_layer(), PackedLinear):
            raise InputError(
                "a dense adapter cannot be merged into a quantised base without loss: the sum is not on the base's "
                "grid. Train with kind quantized, serve the adapter unmerged, or use sqft merge with "
                "merge.allow_precision_loss"
            )

    def merged_tensor(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the tensor that replaces the base's when merged, in the base's own layout."""
        given = (lora_A, lora_B, scaling, self.mask_packed)
        return self._in_layout(effective_weight(self.float_weight(), *given, ordered=self.ordered))

    def float_weight(self) -> torch.Tensor:
        """Return a float base's weight as [O, I]."""
        return self._in_layout(cast(torch.Tensor, self.get_base_layer().weight))

    def _in_layout(self, weight: torch.Tensor) -> torch.Tensor:
        """Turn [O, I] into the base's layout, which is [I, O] in a Conv1D, or back."""
        return weight.T if self.fan_in_fan_out else weight

    def _stored_tensor(self) -> torch.Tensor:
        base = self.get_base_layer()
        return base.packed if isinstance(base, PackedLinear) else cast(torch.Tensor, base.weight)

    def unmerge(self) -> None:
        """Put the base's own tensor back, bit for bit."""
        if self._base_tensor is not None:
            self._stored_tensor().data = self._base_tensor
            self._base_tensor = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return W' - W in float32, in the base's own layout."""
        zero = torch.zeros(self.weight_shape, device=self.base_device)
        given = (*self.merged_factors(adapter), self.scaling[adapter], self.mask_packed)
        return self._in_layout(effective_weight(zero, *given, ordered=self.ordered))


def sqft_layers(model: nn.Module) -> dict[str, SqftLinear]:
    """Return the adapted linears by the name of the linear in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SqftLinear)
    }
