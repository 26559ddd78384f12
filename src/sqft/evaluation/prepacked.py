"""Linears for many forwards on a CPU: weights laid out once as its bfloat16 kernels want them, not in every call.

oneDNN reorders a plain weight each time it multiplies by it, which for the few rows of a decoding step is a third to
half of the product. PyTorch's own compiler does what is done here, through the same two operators; answers are equal to
the bit. The reordered copy costs the linears' size once more, so larger models go without.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BYTES = 2**30
# Rows the layout is chosen for; it serves any number.
_ROWS = 64


class _Product:
    """The forward of a linear with its reordered weight."""

    def __init__(self, linear: nn.Linear) -> None:
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


@contextmanager
def prepacked(model: PreTrainedModel) -> Iterator[int]:
    """Use reordered weights in the block for the plain linears of a model; yield how many linears have them.

    None have where it does not pay or cannot be: weights that are not on a CPU or not in bfloat16, linears of more than
    `MOST_BYTES`, a processor without bfloat16 products, a model that a library of quantised models has loaded: it makes
    weights and forwards of its own, at the first forward. Weights must not change inside the block.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear and _is_plain(module)]
    quantised = getattr(model, "hf_quantizer", None) is not None
    if quantised or sum(linear.weight.nbytes for linear in linears) > MOST_BYTES or not _has_kernels():
        linears = []
    try:
        for linear in linears:
            linear.forward = _Product(linear)  # type: ignore[method-assign]
        yield len(linears)
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _has_kernels() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_plain(linear: nn.Linear) -> bool:
    weight = getattr(linear, "weight", None)
    if weight is None or "forward" in vars(linear):
        return False
    return bool(weight.device.type == "cpu" and weight.dtype == torch.bfloat16)
