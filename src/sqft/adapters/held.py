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

from sqft.adapters.layers import SqftLinear, sqft_layers
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
    """Set the rank of each module in place and hold the weights that this changes anew; return their number.

    Args:
        model: with adapters of ours.
        ranks: {module name: rank} of all of them, from :meth:`sqft.core.ranks.RankSpace.per_module`.
    """
    changed = 0
    with torch.no_grad():
        for name, layer in sqft_layers(model).items():
            if layer.fixed_rank == ranks[name]:
                continue
            layer.fixed_rank = ranks[name]
            changed += 1
            if layer.held is not None:
                layer.held = layer.effective()
    return changed
