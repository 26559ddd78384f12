"""The configuration of adapters: a LoraConfig that has layers of ours built, and how it is saved.

A masked or quantisation-aware adapter is saved with the peft_type `SQFT`, which stock PEFT does not know: loaded as
plain LoRA it would be another model, silently. `import sqft` makes it load. A dense adapter is saved as plain LORA.

In memory it is a LORA configuration that asks for a variant of LoRA which stock layers do not have, so that PEFT itself
refuses to add it to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from sqft.adapters.plain import beyond_plain
from sqft.core.ordered import suits
from sqft.disk import write_json
from sqft.errors import InputError
from sqft.storage.identity import identity

if TYPE_CHECKING:
    from collections.abc import Callable

PEFT_TYPE = "SQFT"
LAYER_OF_KIND: dict[str, Callable[..., nn.Module]] = {}
"""The class of each kind's layers, entered by :mod:`sqft.adapters`: configurations know no layers."""
STARTS = ("compensated", "dequantized", "float")
ARITHMETICS = ("blas", "ordered")
RANK_SPACE = Path("sqft") / "rank_space.json"
"""In an adapter's folder: {choices, groups} of a finished training, or {ranks, rank_groups} as a trainer saved them."""
_OWN_FIELDS = ("kind", "ranks", "rank_groups", "start", "derive_mask", "base_identity", "arithmetic")
_UNSAVED = "needs_sqft_layers"


@dataclass
class SqftConfig(LoraConfig):
    """A LoRA configuration with masks and elastic ranks.

    >>> SqftConfig(kind="sparse", ranks=[32, 24, 16], lora_alpha=64, target_modules=["q_proj"]).r
    32

    Raises:
        InputError: r contradicts ranks, or an option of PEFT that changes the weights in a way masks cannot follow.
    """

    kind: str = field(
        default="sparse",
        metadata={"help": "dense (plain LoRA), sparse (masked by the base's zeros) or quantized (on its grid as well)"},
    )
    ranks: list[int] | None = field(default=None, metadata={"help": "ranks an elastic adapter may take"})
    rank_groups: list[list[str]] = field(
        default_factory=lambda: [["q_proj", "k_proj", "v_proj"]],
        metadata={"help": "target modules of one layer that share a rank"},
    )
    start: str = field(
        default="compensated",
        metadata={"help": "where kind quantized starts: compensated, dequantized or float; see FinetuneConfig"},
    )
    derive_mask: bool = field(
        default=False, metadata={"help": "mask the codes of a quantised base that equal its zero point"}
    )
    base_identity: dict[str, str] | None = field(
        default=None, metadata={"help": "digests of the base; written when the adapter is saved"}
    )
    arithmetic: str | None = field(
        default=None,
        metadata={
            "help": "how kinds sparse and quantized sum B A: blas (the CPU's matrix product) or ordered (alike on "
            "every device; see sqft.core.ordered). None is ordered where there is a GPU or a C++ compiler, else "
            "blas; a saved adapter that does not say was trained with blas"
        },
    )
    needs_sqft_layers: bool = field(
        init=False, default=False, metadata={"is_lora_variant": True, "help": "so for every kind but dense; not saved"}
    )

    def __post_init__(self) -> None:
        """Check what the masks cannot follow, and register the layers."""
        super().__post_init__()
        if self.kind not in LAYER_OF_KIND:
            raise InputError(f"SqftConfig: kind is {self.kind!r}; use {', '.join(LAYER_OF_KIND)}")
        if self.start not in STARTS:
            raise InputError(f"SqftConfig: start is {self.start!r}; use {', '.join(STARTS)}")
        if self.ranks is not None:
            if not self.ranks or min(self.ranks) < 1:
                raise InputError(f"SqftConfig: ranks are {self.ranks}; each must be 1 or more")
            if self.r not in (max(self.ranks), LoraConfig.r):
                raise InputError(f"SqftConfig: r is {self.r}, but the largest of ranks {self.ranks} is not")
            self.r = max(self.ranks)
        if self.lora_alpha <= 0:
            raise InputError(f"SqftConfig: lora_alpha is {self.lora_alpha}; it must be above 0")
        unsupported = beyond_plain(self) + (["use_rslora"] if self.use_rslora else [])
        if unsupported:
            raise InputError(
                f"SqftConfig: {', '.join(unsupported)} cannot be merged exactly into a sparse base; leave off"
            )
        self.needs_sqft_layers = self.kind != "dense"
        if self.arithmetic not in (None, *ARITHMETICS):
            raise InputError(f"SqftConfig: arithmetic is {self.arithmetic!r}; use {' or '.join(ARITHMETICS)}")
        if self.arithmetic is None and self.needs_sqft_layers:
            was_saved = self.base_identity is not None or self.inference_mode
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.arithmetic = "ordered" if not was_saved and suits(device, torch.bfloat16) else "blas"
        self._register_custom_module({nn.Module: cast("Any", adapt)})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as plain LORA when dense, as SQFT with its base's digests otherwise."""
        base = Path(self.base_model_name_or_path or "")
        if self.needs_sqft_layers and self.base_identity is None and (base / "config.json").is_file():
            self.base_identity = identity(base, self.start if self.kind == "quantized" else None)
        if not self.needs_sqft_layers and self.ranks is not None:
            # Plain LORA has no field for them, and a super-adapter without its ranks is one of a single rank.
            write_json(Path(save_directory) / RANK_SPACE, {"ranks": self.ranks, "rank_groups": self.rank_groups})
        saved = _SavedConfig(self)
        LoraConfig.save_pretrained(cast("LoraConfig", saved), save_directory, **kwargs)


class _SavedConfig:
    """A view of a config whose `to_dict` is what goes to disk."""

    def __init__(self, config: SqftConfig) -> None:
        self._config = config

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = self._config.to_dict()
        if not values.pop(_UNSAVED):
            return {name: value for name, value in values.items() if name not in _OWN_FIELDS}
        return {**values, "peft_type": PEFT_TYPE}


def adapt(target: nn.Module, adapter_name: str, config: SqftConfig, **kwargs: Any) -> nn.Module | None:
    """Wrap a target module in a layer with an adapter; PEFT calls this for each target that has no adapter yet.

    Returns:
        The layer of the configuration's kind. None for what is no linear leaves a dense adapter to PEFT.

    Raises:
        InputError: the target is no linear and the adapter masked, or is a parameter, as of fused experts.
    """
    parameter = kwargs.get("parameter_name")
    if parameter is None and isinstance(target, nn.Linear | Conv1D):
        return LAYER_OF_KIND[config.kind](target, adapter_name, config=config, **kwargs)
    if parameter is None and not config.needs_sqft_layers:
        return None
    what = "" if parameter is None else f"the parameter {parameter} of "
    raise InputError(
        f"adapter {adapter_name} is of kind {config.kind}, and PEFT takes one of its target_modules for {what}"
        f"{kwargs.get('target_name', '')}, a {type(target).__name__}, which is no linear; take it out"
    )
