"""Which of a model's linears an adapter's target names match, and which names the installed PEFT refuses.

A name reaches the linears of the decoder's blocks alone: in a model of text and images, its vision tower has a q_proj
too. Where transformers holds routed experts in one tensor, PEFT takes the experts' old names (up_proj) for that tensor,
though a shared expert beside them has linears of these names; it has no masked adapter for a tensor. PEFT also knows
linears whose weight a model reads without calling them (Mamba's out_proj). Both are found by private hooks of PEFT: the
conversion of a configuration for transformers 5, and a tuner's check of a target.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from sqft.model.packed import PackedLinear
from sqft.model.targets import decoder_blocks, fit_matrices

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

# Linears whose weight a model reads without calling them, beside those that PEFT knows: (model type, last name).
_READ_ALONE = {("mamba", "dt_proj"), ("falcon_mamba", "dt_proj")}


def reached(network: PreTrainedModel, target: str) -> tuple[list[str], list[str]]:
    """Return the linears that a target names, as PEFT matches names: (inside the decoder's blocks, elsewhere)."""
    prefix = f"{decoder_blocks(network)[0]}."
    named = [name for name in _linears(network) if name == target or name.endswith(f".{target}")]
    inside = [name for name in named if name.startswith(prefix)]
    return inside, [name for name in named if not name.startswith(prefix)]


def block_linears(network: PreTrainedModel) -> list[str]:
    """Return the last names of the linears in the decoder's blocks, sorted."""
    prefix = f"{decoder_blocks(network)[0]}."
    return sorted({_last(name) for name in _linears(network) if name.startswith(prefix)})


def all_linears(network: PreTrainedModel) -> list[str]:
    """Return the full names of the linears that are adapted where none are named.

    They are all of the decoder's blocks but routers and what PEFT refuses; of a quantised model, those quantised.
    """
    packed = [name for name, module in network.named_modules() if isinstance(module, PackedLinear)]
    every = [] if packed else [t.module for t in fit_matrices(network) if t.parameter == "weight" and t.index is None]
    kept = {last for last in {_last(name) for name in packed or every} if refused(network, last) is None}
    return [name for name in packed or every if _last(name) in kept]


def excluded(network: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Return the modules outside the decoder's blocks, linears or not, that targets name beside linears inside."""
    prefix = f"{decoder_blocks(network)[0]}."
    outside = [name for name, _ in network.named_modules() if not name.startswith(prefix)]
    named = [target for target in targets if reached(network, target)[0]]
    return sorted({name for name in outside for t in named if name == t or name.endswith(f".{t}")})


def refused(network: PreTrainedModel, target: str) -> str | None:
    """Return why PEFT does not adapt a target of this model, None where it does."""
    kind = network.config.model_type
    if (kind, _last(target)) in _READ_ALONE:
        return f"is a linear whose weight a {kind} reads without calling it, so an adapter there would do nothing"
    config = LoraConfig(target_modules=[target])
    with suppress(ImportError):  # a PEFT that does not convert
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        with suppress(AttributeError):
            try:
                convert_peft_config_for_transformers(config, cast("Any", network), None)
                fused = bool(config.target_parameters)
            except ValueError:  # not without its other half, which is in the same tensor
                fused = True
            if fused:
                return (
                    f"is the name of routed experts too, which {kind} holds in one tensor, and PEFT takes it for them; "
                    "there is no masked adapter for such a tensor, so neither are shared experts of that name tuned"
                )
    try:
        with suppress(AttributeError):
            LoraModel._check_target_module_compatiblity(cast("Any", None), config, network, target)
    except ValueError as error:
        return f"is not adapted in a {kind}, says PEFT: {error}"
    return None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _linears(network: PreTrainedModel) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)]
