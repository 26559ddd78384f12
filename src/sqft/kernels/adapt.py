"""The weight that an adapter makes of its base, on a CPU: the ordered arithmetic in one pass of compiled code.

The arithmetic is that of :mod:`sqft.core.ordered` and of the PyTorch path of :mod:`sqft.core.delta` with `ordered`, to
the bit, whatever the processor and the number of threads. `adapt.cpp` is built at first use (:mod:`sqft.kernels.build`)
for what PyTorch says of the processor. Shapes are those of :mod:`sqft.core.delta`.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sqft.kernels import build

if TYPE_CHECKING:
    from sqft.core.grid import QuantizedWeight

DTYPES = (torch.bfloat16, torch.float32)
"""Of the weights that the kernel makes."""
INSIDE = torch.bool
"""Of what :func:`empty_inside` returns."""
_NONE, _BF16, _FP32, _BYTE = range(4)
_TYPES = {torch.bfloat16: _BF16, torch.float32: _FP32, torch.int8: _BYTE, torch.uint8: _BYTE}
_WIDE = 64  # columns of a tile


def available() -> bool:
    """Return whether the kernel runs on this machine; the first call may build it."""
    return KERNEL.library() is not None


def effective_weight(
    weight_OI: torch.Tensor, scaled_A_RI: torch.Tensor, lora_B_OR: torch.Tensor, mask_packed: torch.Tensor | None
) -> torch.Tensor:
    """Return W' in the weight's dtype and layout; see :func:`sqft.core.delta.effective_weight`.

    Args:
        weight_OI: [O, I] of `DTYPES`.
        scaled_A_RI: float32, scaling included.
        lora_B_OR: float32.
        mask_packed: as there.
    """
    result = torch.empty(weight_OI.shape, dtype=weight_OI.dtype)
    _adapt(result, None, scaled_A_RI, lora_B_OR, mask_packed, weight=weight_OI.contiguous())
    return result if weight_OI.is_contiguous() else torch.empty_like(weight_OI).copy_(result)


def effective_quantized(
    weight: QuantizedWeight,
    scaled_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    mask_packed: torch.Tensor | None,
    inside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return Ŵ' in the weight's dtype.

    Args:
        weight: the quantised base.
        scaled_A_RI: float32, scaling included.
        lora_B_OR: float32.
        mask_packed: as in :func:`sqft.core.delta.effective_weight`.
        inside: from :func:`empty_inside`, filled with where the sum was not clamped; or None.
    """
    result = torch.empty(weight.shape, dtype=weight.dtype)
    _adapt(result, inside, scaled_A_RI, lora_B_OR, mask_packed, quantized=weight)
    return result


def effective_codes(
    weight: QuantizedWeight, scaled_A_RI: torch.Tensor, lora_B_OR: torch.Tensor, mask_packed: torch.Tensor | None
) -> torch.Tensor:
    """Return the codes of Ŵ', uint8 [O, I]; arguments as in :func:`effective_quantized`."""
    result = torch.empty(weight.shape, dtype=torch.uint8)
    _adapt(result, None, scaled_A_RI, lora_B_OR, mask_packed, quantized=weight)
    return result


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """Return Ŵ of the codes, in the weight's dtype."""
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=weight.dtype)
    factors = torch.empty(0, columns), torch.empty(rows, 0)
    _adapt(result, None, *factors, None, quantized=replace(weight, start=None))
    return result


def empty_inside(weight: QuantizedWeight) -> torch.Tensor:
    """Return what :func:`effective_quantized` fills and :func:`mask_` takes: bool [O, I]."""
    return torch.empty(weight.shape, dtype=torch.bool)


def adapter_gradients(
    grad_OI: torch.Tensor,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None,
    inside_OI: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dA, dB), float32; see :func:`sqft.core.delta.adapter_gradients`. G is masked in place."""
    mask_(grad_OI, mask_packed, inside_OI)
    factor_A, factor_B = lora_A_RI.to(grad_OI.dtype), lora_B_OR.to(grad_OI.dtype)
    return (factor_B.T @ grad_OI).float().mul_(scaling), (grad_OI @ factor_A.T).float().mul_(scaling)


def mask_(values_OI: torch.Tensor, mask_packed: torch.Tensor | None, inside: torch.Tensor | None) -> None:
    """Set values to 0 where the mask or `inside` is False, in place.

    Args:
        values_OI: contiguous, of 2 or 4 bytes each.
        mask_packed: as in :func:`sqft.core.delta.effective_weight`.
        inside: bool [O, I], or None.
    """
    torch.ops.sqft.mask_(values_OI, mask_packed, inside)


def _adapt(
    result: torch.Tensor,
    inside: torch.Tensor | None,
    scaled_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    mask_packed: torch.Tensor | None,
    *,
    weight: torch.Tensor | None = None,
    quantized: QuantizedWeight | None = None,
) -> None:
    filled = torch.nn.functional.pad(scaled_A_RI, (0, -scaled_A_RI.shape[1] % _WIDE))
    factor_A = filled.unflatten(1, (-1, _WIDE)).transpose(0, 1).contiguous()  # a tile's columns together
    given = (result, inside, factor_A, lora_B_OR.contiguous(), mask_packed, weight)
    if quantized is None:
        torch.ops.sqft.adapt(*given, None, None, None, None, 0)
        return
    grid, start = quantized.grid, quantized.start
    if start is not None and start.dtype not in _TYPES:
        start = start.float()
    parts = quantized.packed.contiguous(), grid.scale_OG.float().contiguous(), grid.zero_OG.contiguous()
    torch.ops.sqft.adapt(*given, *parts, None if start is None else start.contiguous(), grid.bits)


class _Adapted(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "mask", "weight")),
        ("weight_type", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("codes_row", "width", "top", "groups")),
        *((name, ctypes.c_void_p) for name in ("scale", "zero", "start")),
        ("start_type", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_type", ctypes.c_int64),
        ("inside", ctypes.c_void_p),
    )


def _run_adapt(result, inside, factor_A, factor_B, mask, weight, codes, scale, zero, start, bits):
    def address(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    def kind(tensor: torch.Tensor | None) -> int:
        return _NONE if tensor is None else _TYPES[tensor.dtype]

    width = 4 if bits == 3 else bits  # of a code in memory
    layout = (0, 0, 0, 0) if codes is None else (codes.shape[1], width, 2**bits - 1, scale.shape[1])
    job = _Adapted(
        *(*result.shape, factor_B.shape[1], address(factor_A), address(factor_B), address(mask)),
        *(address(weight), kind(weight), address(codes), *layout, address(scale), address(zero)),
        *(address(start), kind(start), address(result), kind(result), address(inside)),
    )
    _loaded().sqft_adapt(ctypes.byref(job), torch.get_num_threads())


def _run_mask(values, mask, inside):
    pointers = (None if part is None else part.data_ptr() for part in (mask, inside))
    arguments = (values.data_ptr(), values.dtype.itemsize, *values.shape, *pointers)
    _loaded().sqft_mask(*arguments, torch.get_num_threads())


def _nothing(*_: Any) -> None:
    """What the operators return: their results are arguments."""


_OPERATORS = torch.library.Library("sqft", "FRAGMENT")
_OPERATORS.define(
    "adapt(Tensor(a!) result, Tensor(b!)? inside, Tensor factor_A, Tensor factor_B, Tensor? mask, Tensor? weight, "
    "Tensor? codes, Tensor? scale, Tensor? zero, Tensor? start, int bits) -> ()"
)
_OPERATORS.define("mask_(Tensor(a!) values, Tensor? mask, Tensor? inside) -> ()")
_OPERATORS.impl("adapt", _run_adapt, "CPU")
_OPERATORS.impl("mask_", _run_mask, "CPU")
torch.library.register_fake("sqft::adapt", _nothing)
torch.library.register_fake("sqft::mask_", _nothing)


def _loaded() -> ctypes.CDLL:
    library = KERNEL.library()
    assert library is not None
    return library


def _load() -> ctypes.CDLL | str:
    """Return the kernel, built if need be, or why there is none."""
    library = build.load("adapt", "training", *build.ONE_BY_ONE, *build.VECTORS.get(build.processor(), ()))
    if isinstance(library, str):
        return library
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.sqft_adapt.argtypes = [pointer, number]
    library.sqft_mask.argtypes = [pointer, *(number,) * 3, pointer, pointer, number]
    return library


KERNEL = build.Kernel(_load, "adapted weights are computed by PyTorch")
