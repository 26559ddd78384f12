"""Weights held ready while a model only answers.

A masked or quantised linear makes its weight anew in every forward, which is what lets training hold no second copy of
it. Answering runs hundreds of forwards on the same weights: inside :func:`held_weights` each is made once and kept, in
the memory of the float model, and every output is equal to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sqft.model.elastic import set_ranks
from sqft.model.layers import SqftLinear, sqft_layers
from sqft.model.packed import PackedLinear

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Hold the effective weights of a model's linears inside the block; inside it, set ranks with :func:`switch_ranks`.

    Args:
        model: in evaluation mode, frozen or not; one without linears of ours is left as it is.
    """
    if model.training:
        raise RuntimeError("weights are held for evaluation; call model.eval() first")
    layers = [module for module in model.modules() if isinstance(module, SqftLinear | PackedLinear)]
    adapted = {id(layer.base_layer) for layer in layers if isinstance(layer, SqftLinear) and layer.kind != "dense"}
    try:
        with torch.no_grad():
            for layer in layers:
                if isinstance(layer, PackedLinear):
                    layer.held = None if id(layer) in adapted else layer.weight
                elif layer.kind != "dense":
                    layer.held = layer.effective()
        yield
    finally:
        for layer in layers:
            layer.held = None


def switch_ranks(model: nn.Module, ranks: Mapping[str, int]) -> int:
    """Set a configuration {group: rank} in place and hold the weights that it changes anew; return their number.

    Raises:
        InputError: the configuration does not fit the model's rank space.
    """
    layers = sqft_layers(model)
    before = {name: layer.fixed_rank for name, layer in layers.items()}
    set_ranks(model, ranks)
    changed = [layer for name, layer in layers.items() if layer.fixed_rank != before[name]]
    with torch.no_grad():
        for layer in changed:
            if layer.held is not None:
                layer.held = layer.effective()
    return len(changed)
