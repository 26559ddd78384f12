"""The gradients of A and B from that of W', in Triton: the mask is applied on the way, and G is only read.

    dB = scaling · (G ⊙ M ⊙ inside) Aᵀ        dA = scaling · Bᵀ (G ⊙ M ⊙ inside)

A library's products would read a masked G twice more, after a pass that writes it. One kernel serves both: a program
goes along one side of G, multiplies each masked tile by the factor's part, and holds its sum in registers. So that a
GPU is full, a side is shared out to several programs, whose float32 sums are added in a fixed order: the same G gives
the same bits again. Products of bfloat16 and float16 are exact, of float32 IEEE.

Shapes: O out features, I in features, R rank, S shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sqft.kernels.tiles import as_bytes, bits_of, device_of, rounded

TILE = (128, 64, 4)
"""Rows, columns and warps, the fastest of those tried on an H200."""
_PROGRAMS = 1056  # eight for each of its multiprocessors


@triton.jit
def _product_kernel(
    grad_ptr, mask_ptr, inside_ptr, factor_ptr, out_ptr, scaling,
    O, I, W, tiles, share, mask_row, inside_row, factor_rank, factor_place,  # noqa: E741
    R: tl.constexpr, RANKS: tl.constexpr, OF_A: tl.constexpr, MASKED: tl.constexpr, INSIDE: tl.constexpr,
    WIDE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Store a share of dA [R, I], or of the transpose of dB [R, O]; `tiles` are of a plane's columns.

    WIDE is for Triton's interpreter, which multiplies the bits of bfloat16 as integers.
    """
    k = tl.arange(0, RANKS)
    if OF_A:
        total = tl.zeros((RANKS, BI), dtype=tl.float32)
        count = tl.cdiv(O, BO)
    else:
        total = tl.zeros((BO, RANKS), dtype=tl.float32)
        count = tiles * tl.cdiv(I, W)
    begin = tl.program_id(1) * share
    for step in tl.range(begin, tl.minimum(begin + share, count)):
        tile = tl.program_id(0) if OF_A else step
        o = (step if OF_A else tl.program_id(0)) * BO + tl.arange(0, BO)
        plane = tile // tiles
        j = (tile - plane * tiles) * BI + tl.arange(0, BI)
        i = plane * W + j
        ok = (o < O)[:, None] & ((j < W) & (i < I))[None, :]
        row = o.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + row * I + i[None, :], mask=ok, other=0.0)
        if MASKED:
            grad = tl.where(bits_of(mask_ptr, row, i, ok, mask_row) == 1, grad, tl.zeros_like(grad))
        if INSIDE:
            inside = bits_of(inside_ptr + plane * tl.cdiv(W, 8), row, j, ok, inside_row)
            grad = tl.where(inside == 1, grad, tl.zeros_like(grad))
        if OF_A:
            at = factor_ptr + k[:, None] * factor_rank + o[None, :] * factor_place
            factor = tl.load(at, mask=(k < R)[:, None] & (o < O)[None, :], other=0.0)
            factor = rounded(factor, grad.dtype)
            if WIDE:
                factor, grad = factor.to(tl.float32), grad.to(tl.float32)
            total = tl.dot(factor, grad, total, input_precision="ieee")
        else:
            at = factor_ptr + i[:, None] * factor_place + k[None, :] * factor_rank
            factor = tl.load(at, mask=(i < I)[:, None] & (k < R)[None, :], other=0.0)
            factor = rounded(factor, grad.dtype)
            if WIDE:
                factor, grad = factor.to(tl.float32), grad.to(tl.float32)
            total = tl.dot(grad, factor, total, input_precision="ieee")
    if OF_A:
        plane = tl.program_id(0) // tiles
        j = (tl.program_id(0) - plane * tiles) * BI + tl.arange(0, BI)
        i = plane * W + j
        out = out_ptr + tl.program_id(1) * R * I + k[:, None] * I + i[None, :]
        tl.store(out, total * scaling, mask=(k < R)[:, None] & ((j < W) & (i < I))[None, :])
    else:
        o = tl.program_id(0) * BO + tl.arange(0, BO)
        out = out_ptr + tl.program_id(1) * R * O + o[:, None] * R + k[None, :]
        tl.store(out, total * scaling, mask=(o < O)[:, None] & (k < R)[None, :])


def adapter_gradients(
    grad_OI: torch.Tensor,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None,
    inside: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dA [R, I], dB [O, R]) in float32.

    Args:
        grad_OI: G [O, I], bfloat16, float16 or float32, contiguous.
        lora_A_RI: [R, I], rounded to G's dtype, as autocast would.
        lora_B_OR: [O, R], likewise.
        scaling: lora_alpha / r_max.
        mask_packed: uint8 [O, ceil(I / 8)], or None.
        inside: what :func:`sqft.kernels.weights.effective_quantized` filled, or None.
    """
    assert grad_OI.is_contiguous()
    rows, columns = grad_OI.shape
    rank, (height, across, warps) = len(lora_A_RI), TILE
    planes = 1 if inside is None else inside.shape[1]
    width = triton.cdiv(columns, planes)
    tiles = triton.cdiv(width, across)
    mask, bits = as_bytes(mask_packed, grad_OI), as_bytes(inside, grad_OI)

    def product(of_A: bool) -> torch.Tensor:
        factor_RN = lora_B_OR.float().T if of_A else lora_A_RI.float()
        programs, steps = planes * tiles, triton.cdiv(rows, height)
        if not of_A:
            programs, steps = steps, programs
        share = triton.cdiv(steps, min(steps, triton.cdiv(_PROGRAMS, programs)))
        shape = (rank, columns) if of_A else (rows, rank)
        sums = torch.empty((triton.cdiv(steps, share), *shape), dtype=torch.float32, device=grad_OI.device)
        _product_kernel[(programs, len(sums))](
            grad_OI, mask, bits, factor_RN, sums, scaling,
            rows, columns, width, tiles, share, mask.stride(0), bits.stride(0), *factor_RN.stride(),
            rank, max(16, triton.next_power_of_2(rank)), of_A, mask_packed is not None, inside is not None,
            not grad_OI.is_cuda, height, across, num_warps=warps,
        )  # fmt: skip
        return sums[0] if len(sums) == 1 else sums.sum(0)

    with device_of(grad_OI):
        return product(of_A=True), product(of_A=False)
