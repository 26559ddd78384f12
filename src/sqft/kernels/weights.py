"""W', Ŵ' and its codes, each in one pass over the weight, in Triton.

The arithmetic is that of :mod:`sqft.core.ordered` and of the PyTorch path of :mod:`sqft.core.delta` with `ordered`, to
the bit: r in order, one rounded product and one rounded sum each, IEEE division, one rounding to the weight's dtype.
What the compiler would do otherwise is switched off: products fused with sums, and approximate division. Rounding to
integers and to bfloat16 is written in additions and integers, so that Triton's interpreter on a CPU agrees as well.

Shapes: O out features, I in features, R rank, G groups of I / G columns, P planes of W columns (see
:func:`sqft.core.grid.pack_codes`). A tile of a quantised weight lies in one plane: its codes are neighbouring bytes and
are shifted by one number. Offsets into a weight are 64 bits wide. Cost of W' of bfloat16: 4 bytes and 2 R operations a
weight, where PyTorch reads and writes 34 bytes and more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sqft.kernels.gradients import adapter_gradients
from sqft.kernels.tiles import as_bytes, bits_of, device_of, rounded

if TYPE_CHECKING:
    from sqft.core.grid import QuantizedWeight

__all__ = [
    "INSIDE",
    "adapter_gradients",
    "dequantized",
    "effective_codes",
    "effective_quantized",
    "effective_weight",
    "empty_inside",
]

INSIDE = torch.uint8
"""Of what :func:`empty_inside` returns."""
TILE, GRID_TILE = (16, 128, 4), (64, 32, 2)
"""Rows, columns and warps, the fastest of those tried on an H200. Rows and columns are fewer than threads: so each
thread loads the factors that it needs, where otherwise the compiler shares them by a barrier for each r. A tile of a
quantised weight is no wider than the smallest usual group, so that it has a scale a row."""
_LEAST = 16  # columns of a tile whose weights share a scale
_NO_START, _OFFSETS, _FLOAT_START = 0, 1, 2
_WEIGHT, _CODES, _DEQUANTIZED = 0, 1, 2
_UNROLL = tl.constexpr(2)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2²³: x + it − it rounds half to even where |x| < 2²²


@triton.jit
def _low_rank(zeros, a_ptr, b_ptr, o, i, a_row, b_row, R: tl.constexpr):
    """Return the tile of Δ, in order, from A [R, I] and the transpose of B [R, O], both padded to whole tiles.

    The sum has the layout of the zeros that it starts from. They come from values that were loaded: a thread then has
    neighbouring columns of few rows, and loads a fifth of what the compiler's own choice of layout would have it load.
    The factors of r + 1 are on their way while those of r are multiplied.
    """
    total = zeros
    b, a = tl.load(b_ptr + o), tl.load(a_ptr + i)
    for r in tl.range(0, R, loop_unroll_factor=_UNROLL):
        ahead = (r + 1) % R
        next_b, next_a = tl.load(b_ptr + ahead * b_row + o), tl.load(a_ptr + ahead * a_row + i)
        total = total + b[:, None] * a[None, :]
        b, a = next_b, next_a
    return total


@triton.jit
def _zeros(w):
    """Return float32 zeros in w's layout: what lies above 16 bits. Float32 has none to spare."""
    if w.dtype == tl.float32:
        return tl.zeros(w.shape, dtype=tl.float32)
    else:
        return (w.to(tl.uint16, bitcast=True).to(tl.uint32) >> 16).to(tl.float32)


@triton.jit
def _float_kernel(
    w_ptr, a_ptr, b_ptr, mask_ptr, out_ptr, O, I, w_row, w_column, out_row, out_column, a_row, b_row, mask_row,  # noqa: E741
    R: tl.constexpr, MASKED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Store W' of a tile; where the mask is 0, the bits of W."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    ok = (o < O)[:, None] & (i < I)[None, :]
    row, column = o.to(tl.int64)[:, None], i.to(tl.int64)[None, :]
    w = tl.load(w_ptr + row * w_row + column * w_column, mask=ok, other=0.0)
    delta = _low_rank(_zeros(w), a_ptr, b_ptr, o, i, a_row, b_row, R)
    result = rounded(w.to(tl.float32) + delta, w.dtype)
    if MASKED:
        result = tl.where(bits_of(mask_ptr, row, i, ok, mask_row) == 1, result, w)
    tl.store(out_ptr + row * out_row + column * out_column, result, mask=ok)


@triton.jit
def _grid_kernel(
    q_ptr, start_ptr, scale_ptr, zero_ptr, a_ptr, b_ptr, mask_ptr, out_ptr, inside_ptr,
    O, I, W, G, group, a_row, b_row, mask_row, inside_row,  # noqa: E741
    ONE_GROUP: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    RESULT: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Store Ŵ', its codes or Ŵ of a tile, and the bits of where the sum was not clamped."""
    tiles = tl.cdiv(W, BI)
    plane = tl.program_id(0) // tiles
    first = (tl.program_id(0) - plane * tiles) * BI
    j = first + tl.arange(0, BI)
    i = plane * W + j
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    ok = (o < O)[:, None] & ((j < W) & (i < I))[None, :]
    row = o.to(tl.int64)[:, None]
    at = row * I + i[None, :]
    byte = tl.load(q_ptr + row * W + j[None, :], mask=ok, other=0).to(tl.int32)
    if RESULT != 2:  # before the loads below, whose values would take registers meanwhile
        delta = _low_rank((byte >> 8).to(tl.float32), a_ptr, b_ptr, o, i, a_row, b_row, R)
    code = ((byte >> (plane * WIDTH)) & ((1 << WIDTH) - 1)).to(tl.float32)
    if ONE_GROUP:  # a scale and a quotient a row
        of_group = row * G + (plane * W + first) // group
        known = (o < O)[:, None]
    else:
        of_group = row * G + (i // group)[None, :]
        known = ok
    scale = tl.load(scale_ptr + of_group, mask=known, other=1.0).to(tl.float32)
    zero = tl.load(zero_ptr + of_group, mask=known, other=0).to(tl.float32)
    if RESULT == 2:
        tl.store(out_ptr + at, rounded((code - zero) * scale, out_ptr.dtype.element_ty), mask=ok)
    else:
        low = 0.0 - zero
        high = ((1 << BITS) - 1) - zero
        if MASKED:
            delta = tl.where(bits_of(mask_ptr, row, i, ok, mask_row) == 1, delta, 0.0)
        if START == 2:
            steps = tl.math.div_rn(tl.load(start_ptr + at, mask=ok, other=0.0).to(tl.float32), scale)
        else:
            steps = code - zero
            if START == 1:
                steps = steps + tl.load(start_ptr + at, mask=ok, other=0).to(tl.float32) * 0.00390625  # exact
        steps = steps + delta * tl.math.div_rn(1.0, scale)
        # A step beyond the grid is far enough: it rounds to outside, and the rounding below needs small numbers. Not
        # min and max: a NaN passes comparisons unchanged, on every device.
        steps = tl.where(steps < low - 1.0, low - 1.0, steps)
        steps = tl.where(steps > high + 1.0, high + 1.0, steps)
        steps = (steps + _TO_INTEGER) - _TO_INTEGER
        clamped = tl.where(steps < low, low, steps)
        clamped = tl.where(clamped > high, high, clamped)
        if RESULT == 1:
            tl.store(out_ptr + at, (clamped + zero).to(tl.int32).to(tl.uint8), mask=ok)
        else:
            tl.store(out_ptr + at, rounded((clamped + 0.0) * scale, out_ptr.dtype.element_ty), mask=ok)
        if INSIDE:
            bits = (steps == clamped).to(tl.int32) << (j % 8)[None, :]
            packed = tl.sum(tl.reshape(bits, (BO, BI // 8, 8)), axis=2)
            k = first // 8 + tl.arange(0, BI // 8)
            inside = inside_ptr + row * inside_row + plane * tl.cdiv(W, 8) + k[None, :]
            tl.store(inside, packed.to(tl.uint8), mask=(o < O)[:, None] & (k < tl.cdiv(W, 8))[None, :])


def effective_weight(
    weight_OI: torch.Tensor, scaled_A_RI: torch.Tensor, lora_B_OR: torch.Tensor, mask_packed: torch.Tensor | None
) -> torch.Tensor:
    """Return W' of a float weight, in its dtype and memory layout.

    Args:
        weight_OI: [O, I] bfloat16, float16 or float32, of any strides.
        scaled_A_RI: float32 [R, I], scaling · A.
        lora_B_OR: float32 [O, R].
        mask_packed: uint8 [O, ceil(I / 8)], or None.
    """
    rows, columns = weight_OI.shape
    height, width, warps = TILE
    result = torch.empty_like(weight_OI)
    lora_A = _padded(scaled_A_RI, triton.cdiv(columns, width) * width)
    lora_B = _padded(lora_B_OR.T, triton.cdiv(rows, height) * height)
    mask = as_bytes(mask_packed, weight_OI)
    with device_of(weight_OI):
        _float_kernel[(triton.cdiv(columns, width), triton.cdiv(rows, height))](
            weight_OI, lora_A, lora_B, mask, result, rows, columns, *weight_OI.stride(), *result.stride(),
            lora_A.stride(0), lora_B.stride(0), mask.stride(0), len(lora_A), mask_packed is not None, height, width,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return result


def effective_quantized(
    weight: QuantizedWeight,
    scaled_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    mask_packed: torch.Tensor | None,
    inside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return Ŵ' [O, I] in the weight's dtype.

    Args:
        weight: the quantised base.
        scaled_A_RI: float32 [R, I], scaling · A.
        lora_B_OR: float32 [O, R].
        mask_packed: uint8 [O, ceil(I / 8)], or None.
        inside: from :func:`empty_inside`, filled with the bits of where the sum was not clamped; or None.
    """
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _on_grid(weight, result, _WEIGHT, (scaled_A_RI, lora_B_OR), mask_packed, inside)
    return result


def effective_codes(
    weight: QuantizedWeight, scaled_A_RI: torch.Tensor, lora_B_OR: torch.Tensor, mask_packed: torch.Tensor | None
) -> torch.Tensor:
    """Return the codes of Ŵ', uint8 [O, I]; arguments as of :func:`effective_quantized`."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    _on_grid(weight, codes, _CODES, (scaled_A_RI, lora_B_OR), mask_packed, None)
    return codes


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """Return Ŵ [O, I] in the weight's dtype."""
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _on_grid(weight, result, _DEQUANTIZED, None, None, None)
    return result


def empty_inside(weight: QuantizedWeight) -> torch.Tensor:
    """Return uint8 [O, P, ceil(W / 8)], to be filled with a bit for each weight, plane by plane."""
    rows, width = weight.packed.shape
    planes = triton.cdiv(weight.shape[1], width)
    return torch.empty(rows, planes, triton.cdiv(width, 8), dtype=torch.uint8, device=weight.device)


def _on_grid(
    weight: QuantizedWeight,
    result: torch.Tensor,
    kind: int,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    mask_packed: torch.Tensor | None,
    inside: torch.Tensor | None,
) -> None:
    """Launch the kernel of quantised weights; what it does not read is any tensor."""
    grid, (rows, columns) = weight.grid, weight.shape
    packed, scale, zero = weight.packed.contiguous(), grid.scale_OG.contiguous(), grid.zero_OG.contiguous()
    width, groups = packed.shape[1], scale.shape[1]
    planes = triton.cdiv(columns, width)
    start = packed if weight.start is None else weight.start.contiguous()
    start_kind = _NO_START if weight.start is None else _FLOAT_START if start.is_floating_point() else _OFFSETS
    mask, bits = as_bytes(mask_packed, packed), as_bytes(inside, packed)
    height, across, warps = GRID_TILE
    group = columns // groups
    if (common := math.gcd(width, group, across)) >= _LEAST:
        height, across = height * across // common, common
    lora_A = lora_B = scale
    if factors is not None:
        lora_A = _padded(factors[0], (planes - 1) * width + triton.cdiv(width, across) * across)
        lora_B = _padded(factors[1].T, triton.cdiv(rows, height) * height)
    with device_of(packed):
        _grid_kernel[(planes * triton.cdiv(width, across), triton.cdiv(rows, height))](
            packed, start, scale, zero, lora_A, lora_B, mask, result, bits,
            rows, columns, width, groups, group, lora_A.stride(0), lora_B.stride(0), mask.stride(0), bits.stride(0),
            group % across == 0 and width % across == 0, 1 if factors is None else len(lora_A), grid.bits,
            4 if grid.bits == 3 else grid.bits, start_kind, kind, mask_packed is not None, inside is not None,
            height, across, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _padded(factor_RN: torch.Tensor, columns: int) -> torch.Tensor:
    """Return a factor contiguous, with zeros up to a number of columns, so that its loads need no bounds."""
    missing = columns - factor_RN.shape[1]
    return torch.nn.functional.pad(factor_RN, (0, missing)) if missing else factor_RN.contiguous()
