"""Linears for many forwards on a CPU: weights laid out once as its matrix kernels take them, not in every call.

oneDNN reorders a plain weight for its AMX kernels in every product, a cost that the few rows of a decoding step do not
amortise. PyTorch's compiler calls the same two operators for this. On one thread the products are equal to the bit; on
several, oneDNN splits some sums differently, and they are equal to rounding. A processor without bfloat16 instructions
gets its weights in float32, with the products of :mod:`sqft.core.bfloat16`. Elsewhere it gains nothing (docs/
decisions.md). Bitwise comparisons of two models use :func:`stock_products`. The copies need the linears' size once
more, or twice in float32, so larger models go without.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional

from sqft.adapters.layers import SqftLinear
from sqft.core.bfloat16 import LEAST_ROWS, fast_products, multiplies_bfloat16
from sqft.kernels import decode
from sqft.model.archived import ArchivedLinear
from sqft.model.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BYTES = 2**30
# Rows the layout is chosen for; it serves any number.
_ROWS = 64
_ALLOWED = ContextVar("prepacking", default=True)


class _Reordered:
    """The forward of a linear with its weight as oneDNN's AMX kernels take it."""

    BYTES: ClassVar[int] = 2

    def __init__(self, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _ROWS)
        self.bias = bias

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


class _InFloat32:
    """The forward of a linear with its weight in float32; of few rows, where that is no faster, the stock product."""

    BYTES: ClassVar[int] = 4

    def __init__(self, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.stock = weight_OI.detach(), bias
        self.wide = self.stock[0].float(), None if bias is None else bias.float()

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() < LEAST_ROWS * input.shape[-1]:
            return functional.linear(input, *self.stock)
        return functional.linear(input.float(), *self.wide).to(input.dtype)


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
    """Use laid out weights in the block, of plain linears and of cached weights; yield how many linears have them.

    None have where it gains nothing or is impossible: weights that are not on a CPU or not in bfloat16, linears whose
    copies take more than `MOST_BYTES`, a processor for which there is no form. Weights must not change inside the
    block. Products that are left, such as those of experts in one tensor, are exchanged by
    :func:`sqft.core.bfloat16.fast_products` as ever.
    """
    form = _form() if _ALLOWED.get() else None
    if form is not None and getattr(model, "is_quantized", False) and model.device.type == "cpu":
        # compressed-tensors makes the weights at the first forward.
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    found = list(_plain(model)) if form is not None else []
    if found and not fit(weight for _, weight, _ in found):
        found = []
    before = [(module, vars(module).get("forward")) for module, _, _ in found]
    try:
        for module, weight, bias in found:
            assert form is not None
            module.forward = form(weight, bias)
        with nullcontext() if _all(model, [module for module, _, _ in found]) else fast_products(model):
            yield len(found)
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def fit(weights_OI: Iterable[torch.Tensor]) -> bool:
    """Return whether linears with these weights are few enough to be laid out on this machine."""
    form = _form()
    return form is None or form.BYTES * sum(weight.numel() for weight in weights_OI) <= MOST_BYTES


def _form() -> type[_Reordered | _InFloat32] | None:
    """Return how weights are laid out for this processor."""
    if not multiplies_bfloat16():
        return _InFloat32
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return _Reordered if amx and _has_kernels() else None


def _all(model: PreTrainedModel, laid_out: list[nn.Module]) -> bool:
    """Return whether a model multiplies by weights in these linears alone, and attends without products of its own."""
    inside = {part for module in laid_out for part in module.modules()}
    others = (m for m in model.modules() if m not in inside and not isinstance(m, nn.Embedding))
    weights = (p for module in others for p in module.parameters(recurse=False) if p.dim() > 1)
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    return not eager and not any(weight.dtype == torch.bfloat16 for weight in weights)


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
        if module in inside or not _is_stock(module):
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


def _is_stock(module: nn.Module) -> bool:
    """Return whether a module's forward is its class' own, or compressed-tensors' around it that changes nothing."""
    own = vars(module).get("forward")
    if own is None:
        return True
    scheme = getattr(module, "quantization_scheme", None)
    unpacked = scheme is None or getattr(module, "quantization_status", None) == "decompressed"
    computes = scheme is not None and (scheme.input_activations or scheme.output_activations)
    return unpacked and not computes and inspect.unwrap(getattr(own, "__func__", own)) is nn.Linear.forward
