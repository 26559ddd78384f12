"""Whether an adapter is plain LoRA, W + scaling · B A, found out by a probe.

PEFT adds ways of training and starting adapters with every release (DoRA, PiSSA, aLoRA, BD-LoRA, ...). A list of them
would be out of date, so a tiny layer is built with the configuration in question and observed: does PEFT take it, does
it have factors A and B alone, and does it compute W x + scaling · B A x? A start that rewrites the base's weights
may need data to do so and cannot be observed: only starts that are known to leave them are taken.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

_RANK, _WIDTH = 2, 16
_ELSEWHERE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora")
"""What a configuration changes elsewhere than in a float linear, so that no such layer can show it."""
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts that leave the base's weights as they are."""


def plain_settings(config: LoraConfig) -> dict[str, Any]:
    """Return the settings of a configuration that LoraConfig's constructor takes."""
    values: dict[str, Any] = config.to_dict()
    return {f.name: values[f.name] for f in fields(LoraConfig) if f.init and f.name in values}


def beyond_plain(config: LoraConfig) -> list[str]:
    """Return what an adapter of this configuration does beyond W + scaling · B A; nothing for a plain LoRA."""
    found = [name for name in _ELSEWHERE if getattr(config, name, None)]
    if config.bias != "none":
        found.append(f"bias: {config.bias}")
    if config.init_lora_weights not in _STARTS:
        found.append(f"init_lora_weights: {config.init_lora_weights}, which rewrites the base's weights")
        return found
    # Building a layer draws random numbers, which would change what is trained after it.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return found + _observed(config)


def _observed(config: LoraConfig) -> list[str]:
    variants = [
        f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant") and getattr(config, f.name, None)
    ]
    torch.manual_seed(0)
    base = nn.Linear(_WIDTH, _WIDTH)
    config = copy.deepcopy(config)
    vars(config)["needs_sqft_layers"] = False  # the probe is a stock layer, which would refuse the mask
    try:
        layer = LoraLinear(base, "probe", config, r=_RANK, lora_alpha=2 * _RANK)
    except Exception as error:  # PEFT's checks raise whatever fits them
        return [f"{', '.join(variants) or 'its settings'} (PEFT: {error})"]
    if layer.lora_variant:
        return variants or [type(layer.lora_variant["probe"]).__name__]
    trained = {name for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")}
    if trained != {"lora_A.probe.weight", "lora_B.probe.weight"}:
        more = sorted(trained - {"lora_A.probe.weight", "lora_B.probe.weight"})
        return [f"{'lora_bias' if config.lora_bias else 'more'} (parameters {', '.join(more)})"]
    lora_A, lora_B = (cast(torch.Tensor, part["probe"].weight) for part in (layer.lora_A, layer.lora_B))
    nn.init.normal_(lora_A)
    nn.init.normal_(lora_B)
    layer.eval()
    x = torch.randn(3, _WIDTH)
    plain = base(x) + layer.scaling["probe"] * (x @ lora_A.T @ lora_B.T)
    return (
        [] if torch.allclose(layer(x), plain, rtol=1e-4, atol=1e-4) else ["a forward other than W x + scaling · B A x"]
    )
