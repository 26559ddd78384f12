"""Linears for many forwards on a CPU with AMX: weights reordered once for its bfloat16 kernels, not in every call.

oneDNN reorders a plain weight for its AMX kernels in every product, a cost that the few rows of a decoding step do not
amortise. PyTorch's compiler calls the same two operators for this. On CPUs without AMX it gains nothing (docs/
decisions.md), so they run stock linears. On one thread the products are equal to the bit; on several, oneDNN splits
some sums differently, and they are equal to rounding. Bitwise comparisons of two models use :func:`stock_products`. The
copy needs the linears' size once more, so larger models go without.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import nn

from sqft.adapters.layers import SqftLinear
from sqft.kernels import decode
from sqft.model.archived import ArchivedLinear
from sqft.model.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BYTES = 2**30
# Rows the layout is chosen for; it serves any number.
_ROWS = 64
_ALLOWED = ContextVar("prepacking", default=True)


class _Product:
    """The forward of a linear with its reordered weight."""

    def __init__(self, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _ROWS)
        self.bias = bias

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


@contextmanager
def stock_products() -> Iterator[None]:
    """Let all models run PyTorch's stock linears inside the block: none is prepacked, none decodes by our kernel."""
    token = _ALLOWED.set(False)
    try:
        with decode.stock():
            yield
    finally:
        _ALLOWED.reset(token)


@contextmanager
def prepacked(model: PreTrainedModel) -> Iterator[int]:
    """Use reordered weights in the block, of plain linears and of cached weights; yield how many linears have them.

    None have where it gains nothing or is impossible: weights that are not on a CPU or not in bfloat16, linears of more
    than `MOST_BYTES`, a processor without AMX, a model loaded by a quantisation library, which makes weights and
    forwards of its own at the first forward. Weights must not change inside the block.
    """
    found = list(_plain(model)) if _ALLOWED.get() else []
    quantised = getattr(model, "is_quantized", False)
    if quantised or sum(weight.nbytes for _, weight, _ in found) > MOST_BYTES or not (_gains() and _has_kernels()):
        found = []
    try:
        for module, weight, bias in found:
            module.forward = _Product(weight, bias)
        yield len(found)
    finally:
        for module, _, _ in found:
            vars(module).pop("forward", None)


def _gains() -> bool:
    """Return whether the processor has AMX; elsewhere the reordered products were no faster."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _has_kernels() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    needed = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in needed) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _plain(model: nn.Module) -> Iterator[tuple[nn.Module, torch.Tensor, torch.Tensor | None]]:
    """Yield (module, weight, bias) of every module whose forward is one product with a bfloat16 weight on a CPU."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        weight, bias = None, getattr(module, "bias", None)
        if module in inside or "forward" in vars(module):
            continue
        if isinstance(module, SqftLinear):
            in_force = bool(module.active_adapters) and not module.disable_adapters and not module.merged
            if in_force and module.cached is not None and not module.fan_in_fan_out:
                weight, bias = module.cached, module.get_base_layer().bias
                inside.update(module.modules())
        elif isinstance(module, PackedLinear | ArchivedLinear):
            weight = module.cached
        elif type(module) is nn.Linear:
            weight = getattr(module, "weight", None)
        if weight is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            yield module, weight, bias
