"""Caching the effective and dequantised weights of a model during evaluation.

A masked or quantised linear computes its weight in every forward, so training needs no second copy of it. Evaluation
runs hundreds of forwards on the same weights: inside :func:`cached_weights` each is computed once and kept, which takes
the memory of the float model. Every output is equal to the bit. An archive may have been chosen for its size in memory:
its weights are kept only where they take at most half of what is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from sqft.adapters.layers import sqft_layers
from sqft.adapters.masked import SqftMaskedLinear
from sqft.kernels import decode
from sqft.model.archived import ArchivedLinear
from sqft.model.packed import PackedLinear

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def cached_weights(model: nn.Module, *, but_decoded: bool = False) -> Iterator[None]:
    """Cache the effective weights of a model's linears inside the block; change ranks there with :func:`switch_ranks`.

    Args:
        model: in evaluation mode, frozen or not; one without linears of ours is left as it is.
        but_decoded: leave packed and archived linears as they are where the kernel for decoding multiplies them: for
            one sequence.
    """
    if model.training:
        raise RuntimeError("weights are cached for evaluation alone; call model.eval() first")
    packed: list[PackedLinear | ArchivedLinear] = [m for m in model.modules() if isinstance(m, PackedLinear)]
    packed += _that_fit([module for module in model.modules() if isinstance(module, ArchivedLinear)])
    masked = [module for module in model.modules() if isinstance(module, SqftMaskedLinear)]
    adapted = {id(layer.base_layer) for layer in masked}
    try:
        with torch.no_grad():
            decoded = but_decoded and decode.available()
            for linear in packed:
                left = id(linear) in adapted or (decoded and linear.stored is not None)
                linear.cached = None if left else linear.weight
            for layer in masked:
                layer.cached = layer.effective()
        yield
    finally:
        for linear in packed:
            linear.cached = None
        for layer in masked:
            layer.cached = None


def _that_fit(archived: list[ArchivedLinear]) -> list[ArchivedLinear]:
    """Return these linears if the memory that is free has room for their weights, else none."""
    needed = sum(2 * linear.in_features * linear.out_features for linear in archived)
    return archived if needed <= psutil.virtual_memory().available / 2 else []


def switch_ranks(model: nn.Module, ranks: Mapping[str, int]) -> int:
    """Set each module's rank in place, recompute the cached weights that this changes, and return their number.

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
            if isinstance(layer, SqftMaskedLinear) and layer.cached is not None:
                layer.cached = layer.effective()
    return changed
