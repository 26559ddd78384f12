"""The weight that an adapter makes of its base, W', and the linear that trains through it.

    W' = W + scaling · (B A) ⊙ M        SparsePEFT, equations 1 and 2; M is absent for a dense adapter

Shapes: T tokens, O out features, I in features, R rank. Training's forward, evaluation, search and merge all call
:func:`effective_weight`, and nothing else computes W': that is what makes the merge exact. It works in float32 with
autocast off and rounds once, to the base's dtype.

Cost, in matmuls of 2·T·O·I operations: plain LoRA 2 (its base forward and its input gradient), this 3 (the third is
G = dYᵀX), the reference's form 5. Building W' takes another 2·O·I·R twice, so few tokens a step make it dear. The
forward is one matmul with W'; backward builds W' again instead of saving it, into the buffer that then holds G. Rows
are built in chunks that fit a core's cache: elementwise passes over a whole float32 weight cost more than the matmul.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 1 << 20  # of float32: half of a server core's second-level cache
_LARGE = 1 << 22  # elements of a weight from which oneDNN's dYᵀX is 1.4 times faster on a contiguous dYᵀ
_BITS: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def _bit_table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return [256, 8]: the bits of each byte as numbers.

    A look-up unpacks 5 to 10 times faster than shifts, and a mask that already has the other factor's dtype multiplies
    twice as fast as a bool one.
    """
    if (device, dtype) not in _BITS:
        codes = torch.arange(256, device=device).unsqueeze(1)
        _BITS[device, dtype] = ((codes >> torch.arange(8, device=device)) & 1).to(dtype)
    return _BITS[device, dtype]


def _row_chunks(rows: int, columns: int, device: torch.device, chunk_bytes: int, itemsize: int) -> Iterator[slice]:
    """Split the rows of a weight so that a chunk stays in cache; on an accelerator one chunk is best."""
    step = rows if device.type != "cpu" else max(8, chunk_bytes // (itemsize * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _mask_rows(mask_packed: torch.Tensor, rows: slice, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask of a chunk as ones and zeros, [rows, columns]."""
    packed = mask_packed[rows]
    bits = torch.index_select(_bit_table(packed.device, dtype), 0, packed.flatten().int())
    return bits.view(packed.shape[0], -1)[:, :columns]


def effective_weight(
    weight_OI: torch.Tensor,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return W' = W + scaling · (B A) ⊙ M (SQFT equations 1 and 2), rounded once to the base's dtype.

    Args:
        weight_OI: the base's weight [O, I], any float dtype; a transposed view is fine (Conv1D).
        lora_A_RI: [R, I], any float dtype.
        lora_B_OR: [O, R], any float dtype.
        scaling: lora_alpha / r_max.
        mask_packed: uint8 [O, ceil(I / 8)] from :func:`sqft.core.mask.pack_mask`, or None for a dense delta.

    Returns:
        [O, I] in the base's dtype and memory layout. Entries outside the mask equal the base's bit for bit.
    """
    result = torch.empty_like(weight_OI)
    rows, columns = weight_OI.shape
    with torch.no_grad(), torch.autocast(weight_OI.device.type, enabled=False):
        scaled_A = lora_A_RI.float() * scaling
        lora_B = lora_B_OR.float()
        for chunk in _row_chunks(rows, columns, weight_OI.device, _CHUNK_BYTES, itemsize=4):
            delta = lora_B[chunk] @ scaled_A
            # A copy even of a float32 weight, which the update must not touch.
            effective = weight_OI[chunk].to(torch.float32, copy=True)
            if mask_packed is None:
                effective += delta
            else:
                effective.addcmul_(delta, _mask_rows(mask_packed, chunk, columns, torch.float32))
            result[chunk] = effective
    return result


def adapter_gradients(
    grad_OI: torch.Tensor,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dA, dB) from the gradient G = dYᵀX of the loss by W'.

    dA = scaling · Bᵀ (G ⊙ M), dB = scaling · (G ⊙ M) Aᵀ. A bfloat16 G is multiplied in bfloat16, as autocast would.

    Args:
        grad_OI: G [O, I], float32 or the compute dtype.
        lora_A_RI: [R, I].
        lora_B_OR: [O, R].
        scaling: lora_alpha / r_max.
        mask_packed: as in :func:`effective_weight`.

    Returns:
        float32 [R, I] and [O, R].
    """
    rows, columns = grad_OI.shape
    factor_A, factor_B = lora_A_RI.to(grad_OI.dtype), lora_B_OR.to(grad_OI.dtype)
    grad_A = torch.zeros(lora_A_RI.shape, dtype=torch.float32, device=grad_OI.device)
    grad_B = torch.empty(lora_B_OR.shape, dtype=torch.float32, device=grad_OI.device)
    for chunk in _row_chunks(rows, columns, grad_OI.device, 2 * _CHUNK_BYTES, grad_OI.dtype.itemsize):
        masked = grad_OI[chunk]
        if mask_packed is not None:
            masked = masked * _mask_rows(mask_packed, chunk, columns, grad_OI.dtype)
        grad_A += factor_B[chunk].T @ masked
        grad_B[chunk] = masked @ factor_A.T
    return grad_A.mul_(scaling), grad_B.mul_(scaling)


class MaskedLinear(torch.autograd.Function):
    """y = x W'ᵀ + bias, saving no tensor of the weight's size.

    The arguments of :meth:`apply` are (x, weight, bias, lora_A, lora_B, scaling, mask_packed, transposed). With
    `transposed` the weight is stored [I, O] (Conv1D) and the same matmul runs as in the merged layer, so that live and
    merged outputs are equal to the bit.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A_RI: torch.Tensor,
        lora_B_OR: torch.Tensor,
        scaling: float,
        mask_packed: torch.Tensor | None,
        transposed: bool,
    ) -> torch.Tensor:
        device = x.device.type
        input_dtype = x.dtype
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input_dtype
        x = x.to(compute)
        ctx.save_for_backward(x, weight, bias, lora_A_RI, lora_B_OR, mask_packed)
        ctx.scaling, ctx.transposed, ctx.input_dtype = scaling, transposed, input_dtype
        weight_OI = weight.T if transposed else weight
        effective = effective_weight(weight_OI, lora_A_RI, lora_B_OR, scaling, mask_packed).to(compute)
        bias = None if bias is None else bias.to(compute)
        with torch.autocast(device, enabled=False):
            if not transposed:
                return functional.linear(x, effective, bias)
            flat = x.reshape(-1, x.shape[-1])
            product = flat @ effective.T if bias is None else torch.addmm(bias, flat, effective.T)
            return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x, weight, bias, lora_A_RI, lora_B_OR, mask_packed = ctx.saved_tensors
        weight_OI = weight.T if ctx.transposed else weight
        grad_x = grad_bias = grad_A = grad_B = None
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_TO = grad_y.to(x.dtype).reshape(-1, grad_y.shape[-1])
            buffer = None
            if ctx.needs_input_grad[0]:
                buffer = effective_weight(weight_OI, lora_A_RI, lora_B_OR, ctx.scaling, mask_packed).to(x.dtype)
                grad_x = (grad_TO @ buffer).view(x.shape).to(ctx.input_dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias = grad_TO.sum(dim=0).to(bias.dtype)
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
                x_TI = x.reshape(-1, x.shape[-1])
                grad_OT = grad_TO.T
                if weight.numel() >= _LARGE and weight.device.type == "cpu":
                    grad_OT = grad_OT.contiguous()
                if buffer is None or not buffer.is_contiguous():
                    gradient = grad_OT @ x_TI
                else:
                    gradient = torch.mm(grad_OT, x_TI, out=buffer)
                grad_A, grad_B = adapter_gradients(gradient, lora_A_RI, lora_B_OR, ctx.scaling, mask_packed)
                grad_A, grad_B = grad_A.to(lora_A_RI.dtype), grad_B.to(lora_B_OR.dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None
