"""The low-rank product in a defined order, which every device and every library can repeat to the bit.

    Δ[o, i] = (…((0 + B[o, 0] · A[0, i]) + B[o, 1] · A[1, i]) + …) + B[o, R−1] · A[R−1, i]

IEEE float32: each product and each sum is rounded once, to nearest, ties to even, and no product is fused with its
sum. A is the adapter's A times the scaling, rounded once. A matrix product has no such definition: its order and its
fused operations are its library's choice, so a GPU's differs from a CPU's. The Triton kernels compute this; here it is
in PyTorch, for devices without them. Elementwise passes cost 10 to 20 times what a matrix product costs.

`torch.addcmul` and `torch.addr` are of no use: on a CPU they round once for the two operations, elsewhere twice.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

_LOG = logging.getLogger(__name__)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # that the kernels read and write
CHUNK_BYTES = 1 << 18
"""Of float32 a chunk of rows: the sum and the product together stay in a core's second-level cache."""


def ordered_product(lora_B_OR: torch.Tensor, scaled_A_RI: torch.Tensor) -> torch.Tensor:
    """Return B A [O, I] in the order of the module, on any device.

    Args:
        lora_B_OR: float32 [O, R], of any strides.
        scaled_A_RI: float32 [R, I], scaling included.
    """
    total = torch.zeros(lora_B_OR.shape[0], scaled_A_RI.shape[1], device=lora_B_OR.device)
    product = torch.empty_like(total)
    for b_O1, a_I in zip(lora_B_OR.unsqueeze(-1).unbind(1), scaled_A_RI.unbind(0), strict=True):
        torch.mul(b_O1, a_I, out=product)
        total.add_(product)
    return total


def kernels_on(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the kernels of the ordered arithmetic for a weight's device and dtype; None where there are none.

    On CUDA with Triton :mod:`sqft.kernels.weights`, on a CPU with a C++ compiler :mod:`sqft.kernels.adapt`, whose first
    use builds it.
    """
    if device.type == "cuda":
        return _on_card() if dtype in _FLOATS else None
    return _on_processor(dtype) if device.type == "cpu" else None


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether new adapters of a base on this device are to have the ordered arithmetic.

    On a card always: BLAS there would mean the CPU's. On a CPU where a kernel makes it the faster one.
    """
    return device.type == "cuda" or kernels_on(device, dtype) is not None


@cache
def _on_processor(dtype: torch.dtype) -> ModuleType | None:
    from sqft.kernels import adapt

    return adapt if dtype in adapt.DTYPES and adapt.available() else None


@cache
def _on_card() -> ModuleType | None:
    try:
        from sqft.kernels import weights
    except ImportError:
        _LOG.warning(
            "Triton is not installed: weights are computed by PyTorch, equal to the bit but several times slower"
        )
        return None
    return weights
