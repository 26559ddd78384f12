"""The weight that an adapter makes of its base, W', and the linear that trains through it.

    W' = W + scaling · (B A) ⊙ M                          SparsePEFT, equations 1 and 2; M is absent if dense
    Ŵ' = s · clamp(round((W_start + scaling · (B A) ⊙ M) / s), −z, 2ⁿ − 1 − z)     QA-SparsePEFT, equations 3 and 4

Shapes: T tokens, O out features, I in features, R rank. Training's forward, evaluation, search and merge all call
:func:`effective_weight`, and nothing else computes W' or Ŵ': that is what makes the merge exact. It works in IEEE
float32, with autocast and TF32 off (:mod:`sqft.core.precision`), and rounds once, to the base's dtype. A base that is a
tensor gives W'; a base that is a :class:`~sqft.core.grid.QuantizedWeight` gives Ŵ', with the base's own scales and zero
points. The rounding's gradient is taken as the identity inside the grid and as zero where the sum is clamped
(straight-through).

Cost, in matmuls of 2·T·O·I operations: plain LoRA 2 (its base forward and its input gradient), this 3 (the third is
G = dYᵀX), the reference's form 5. Building W' takes another 2·O·I·R twice, so few tokens a step make it dear. The
forward is one matmul with W'; backward builds W' again instead of saving it, into the buffer that then holds G. Rows
are built in chunks that fit a core's cache: elementwise passes over a whole float32 weight cost more than the matmul.

B A has one of two arithmetics, which training, merge and verify must share. `ordered` is defined operation by operation
(:mod:`sqft.core.ordered`), so that any device, library and number of threads repeats it to the bit: then 1 / s, its
product with the delta and the sum with W_start are rounded one by one too, weights outside the mask keep all their
bits, and no Ŵ' is -0. It runs in kernels that take no memory but the result: Triton on CUDA, C++ on a CPU. `blas` is
the CPU's matrix product, for where there is no compiler; what lies on a GPU is brought to the CPU for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sqft.core.chunks import mask_rows, row_chunks
from sqft.core.grid import QuantizedWeight
from sqft.core.ordered import CHUNK_BYTES, kernels_on, ordered_product
from sqft.core.precision import ieee_products

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 1 << 20  # of float32: half of a server core's second-level cache
_LARGE = 1 << 22  # elements of a weight from which oneDNN's dYᵀX is 1.4 times faster on a contiguous dYᵀ


@torch.no_grad()
def effective_weight(
    weight_OI: torch.Tensor | QuantizedWeight,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None = None,
    *,
    inside_OI: torch.Tensor | None = None,
    ordered: bool = False,
) -> torch.Tensor:
    """Return W' = W + scaling · (B A) ⊙ M, or Ŵ' on a quantised base; see the module. Rounded once to the base's dtype.

    Args:
        weight_OI: the base's weight [O, I], any float dtype (a transposed view is fine: Conv1D), or a quantised one.
        lora_A_RI: [R, I], any float dtype.
        lora_B_OR: [O, R], any float dtype.
        scaling: lora_alpha / r_max.
        mask_packed: uint8 [O, ceil(I / 8)] from :func:`sqft.core.mask.pack_mask`, or None for a dense delta.
        inside_OI: from :func:`empty_inside`, filled with where the sum was not clamped; for a quantised base alone.
        ordered: the arithmetic; see the module.

    Returns:
        [O, I] in the base's dtype and memory layout. Entries outside the mask equal the base's bit for bit.
    """
    if not ordered and weight_OI.device.type == "cuda":
        factors, mask = (lora_A_RI.cpu(), lora_B_OR.cpu()), None if mask_packed is None else mask_packed.cpu()
        inside = None if inside_OI is None else torch.empty_like(inside_OI, device="cpu")
        effective = effective_weight(weight_OI.to("cpu"), *factors, scaling, mask, inside_OI=inside)
        if inside_OI is not None and inside is not None:
            inside_OI.copy_(inside)
        return effective.to(weight_OI.device)
    if ordered and (kernels := kernels_on(weight_OI.device, weight_OI.dtype)) is not None:
        factors = _factors(lora_A_RI, lora_B_OR, scaling)
        if isinstance(weight_OI, QuantizedWeight):
            return kernels.effective_quantized(weight_OI, *factors, mask_packed, inside_OI)  # type: ignore[no-any-return]
        return kernels.effective_weight(weight_OI, *factors, mask_packed)  # type: ignore[no-any-return]
    if isinstance(weight_OI, QuantizedWeight):
        result = torch.empty(weight_OI.shape, dtype=weight_OI.dtype, device=weight_OI.device)
        for chunk, steps, scale in _adapted_steps(
            weight_OI, lora_A_RI, lora_B_OR, scaling, mask_packed, inside_OI, ordered
        ):
            result[chunk] = steps.mul_(scale).flatten(1)
        return result
    result = torch.empty_like(weight_OI)
    with torch.autocast(weight_OI.device.type, enabled=False), ieee_products(weight_OI.device):
        for chunk, delta, mask in _delta_chunks(weight_OI, lora_A_RI, lora_B_OR, scaling, mask_packed, ordered):
            # A copy even of a float32 weight, which the update must not touch.
            effective = weight_OI[chunk].to(torch.float32, copy=True)
            if mask is None:
                effective += delta
            elif ordered:
                effective = torch.where(mask, delta.add_(effective), effective)
            else:
                effective.addcmul_(delta, mask)
            result[chunk] = effective
    return result


@torch.no_grad()
def effective_codes(
    weight: QuantizedWeight,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None = None,
    *,
    ordered: bool = False,
) -> torch.Tensor:
    """Return the codes of Ŵ', uint8 [O, I]: those that :func:`effective_weight` dequantises; it has the arguments."""
    if not ordered and weight.device.type == "cuda":
        mask = None if mask_packed is None else mask_packed.cpu()
        codes = effective_codes(weight.to("cpu"), lora_A_RI.cpu(), lora_B_OR.cpu(), scaling, mask)
        return codes.to(weight.device)
    if ordered and (kernels := kernels_on(weight.device, weight.dtype)) is not None:
        return kernels.effective_codes(weight, *_factors(lora_A_RI, lora_B_OR, scaling), mask_packed)  # type: ignore[no-any-return]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for chunk, steps, _ in _adapted_steps(weight, lora_A_RI, lora_B_OR, scaling, mask_packed, None, ordered):
        codes[chunk] = steps.add_(weight.grid.zero_OG[chunk].float().unsqueeze(-1)).flatten(1)
    return codes


def empty_inside(weight: QuantizedWeight, *, ordered: bool) -> torch.Tensor:
    """Return what :func:`effective_weight` fills and :func:`adapter_gradients` takes: bool [O, I], or kernels' bits."""
    if ordered and (kernels := kernels_on(weight.device, weight.dtype)) is not None:
        return kernels.empty_inside(weight)  # type: ignore[no-any-return]
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


def _factors(lora_A_RI: torch.Tensor, lora_B_OR: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scaling · A, B) in float32."""
    return lora_A_RI.float() * scaling, lora_B_OR.float()


def _delta_chunks(
    weight: torch.Tensor | QuantizedWeight,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None,
    ordered: bool,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Yield (rows, scaling · B A, mask or None) in float32, chunk by chunk of rows; an ordered one's mask is bool."""
    rows, columns = weight.shape
    scaled_A, lora_B = _factors(lora_A_RI, lora_B_OR, scaling)
    for chunk in row_chunks(rows, columns, weight.device, CHUNK_BYTES if ordered else _CHUNK_BYTES, itemsize=4):
        dtype = torch.bool if ordered else torch.float32
        mask = None if mask_packed is None else mask_rows(mask_packed, chunk, columns, dtype)
        yield chunk, ordered_product(lora_B[chunk], scaled_A) if ordered else lora_B[chunk] @ scaled_A, mask


def _adapted_steps(
    weight: QuantizedWeight,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None,
    inside_OI: torch.Tensor | None,
    ordered: bool,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (rows, q − z of the adapted weight, scale), the last two float32 [rows, G, I / G] and [rows, G, 1]."""
    with torch.autocast(weight.device.type, enabled=False), ieee_products(weight.device):
        for chunk, delta, mask in _delta_chunks(weight, lora_A_RI, lora_B_OR, scaling, mask_packed, ordered):
            scale, low, high = weight.grid.steps(chunk)
            if mask is not None:
                delta = torch.where(mask, delta, 0.0) if ordered else delta.mul_(mask)
            delta = delta.unflatten(1, (scale.shape[1], -1))
            steps = weight.start_steps(chunk)
            # addcdiv may round its quotient or not, as the device does.
            steps = steps.add_(delta.mul_(scale.reciprocal())) if ordered else steps.addcdiv_(delta, scale)
            steps = steps.round_()
            if inside_OI is None:
                torch.minimum(torch.maximum(steps, low, out=steps), high, out=steps)
            else:
                clamped = torch.minimum(torch.maximum(steps, low), high)
                torch.eq(steps, clamped, out=inside_OI[chunk].unflatten(1, (scale.shape[1], -1)))
                steps = clamped
            yield chunk, steps.add_(0.0) if ordered else steps, scale  # -0 becomes 0


def adapter_gradients(
    grad_OI: torch.Tensor,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    scaling: float,
    mask_packed: torch.Tensor | None,
    inside_OI: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dA, dB) from the gradient G = dYᵀX of the loss by W'.

    dA = scaling · Bᵀ (G ⊙ M), dB = scaling · (G ⊙ M) Aᵀ. A bfloat16 G is multiplied in bfloat16, as autocast would.

    Args:
        grad_OI: G [O, I], float32 or the compute dtype; a kernel may mask it in place.
        lora_A_RI: [R, I].
        lora_B_OR: [O, R].
        scaling: lora_alpha / r_max.
        mask_packed: as in :func:`effective_weight`.
        inside_OI: what :func:`effective_weight` filled; G counts where it is True. None is everywhere.

    Returns:
        float32 [R, I] and [O, R].
    """
    given = (lora_A_RI, lora_B_OR, scaling, mask_packed, inside_OI)
    kernels = kernels_on(grad_OI.device, grad_OI.dtype) if grad_OI.is_contiguous() else None
    if kernels is not None and (inside_OI is None or inside_OI.dtype == kernels.INSIDE):
        return kernels.adapter_gradients(grad_OI, *given)  # type: ignore[no-any-return]
    rows, columns = grad_OI.shape
    factor_A, factor_B = lora_A_RI.to(grad_OI.dtype), lora_B_OR.to(grad_OI.dtype)
    grad_A = torch.zeros(lora_A_RI.shape, dtype=torch.float32, device=grad_OI.device)
    grad_B = torch.empty(lora_B_OR.shape, dtype=torch.float32, device=grad_OI.device)
    for chunk in row_chunks(rows, columns, grad_OI.device, 2 * _CHUNK_BYTES, grad_OI.dtype.itemsize):
        masked = grad_OI[chunk]
        if mask_packed is not None:
            masked = masked * mask_rows(mask_packed, chunk, columns, grad_OI.dtype)
        if inside_OI is not None:
            masked = masked * inside_OI[chunk]
        grad_A += factor_B[chunk].T @ masked
        grad_B[chunk] = masked @ factor_A.T
    return grad_A.mul_(scaling), grad_B.mul_(scaling)


class MaskedLinear(torch.autograd.Function):
    """y = x W'ᵀ + bias, saving no tensor of the weight's size.

    The arguments of :meth:`apply` are (x, weight, bias, lora_A, lora_B, scaling, mask_packed, transposed, ordered).
    The weight is a tensor or a :class:`~sqft.core.grid.QuantizedWeight`, frozen either way. With `transposed` a tensor
    is stored [I, O] (Conv1D) and the same matmul runs as in the merged layer, so that live and merged outputs are equal
    to the bit. `ordered` is the arithmetic of the weight; see the module.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None,
        lora_A_RI: torch.Tensor,
        lora_B_OR: torch.Tensor,
        scaling: float,
        mask_packed: torch.Tensor | None,
        transposed: bool,
        ordered: bool = False,
    ) -> torch.Tensor:
        device = x.device.type
        input_dtype = x.dtype
        compute = _compute_dtype(x)
        x = x.to(compute)
        weight_OI = weight.T if transposed and isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(x, bias, lora_A_RI, lora_B_OR, mask_packed)
        # The base is frozen and lives with its module: it is referred to, not saved.
        ctx.weight_OI, ctx.scaling, ctx.input_dtype, ctx.ordered = weight_OI, scaling, input_dtype, ordered
        effective = effective_weight(weight_OI, lora_A_RI, lora_B_OR, scaling, mask_packed, ordered=ordered).to(compute)
        bias = None if bias is None else bias.to(compute)
        with torch.autocast(device, enabled=False):
            return project(x, effective, bias, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x, bias, lora_A_RI, lora_B_OR, mask_packed = ctx.saved_tensors
        weight_OI, quantized = ctx.weight_OI, isinstance(ctx.weight_OI, QuantizedWeight)
        grad_x = grad_bias = grad_A = grad_B = None
        train_adapter = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_TO = grad_y.to(x.dtype).reshape(-1, grad_y.shape[-1])
            buffer: torch.Tensor | None = None
            inside: torch.Tensor | None = None
            if quantized and train_adapter:
                inside = empty_inside(weight_OI, ordered=ctx.ordered)
            if ctx.needs_input_grad[0] or inside is not None:
                factors, how = (lora_A_RI, lora_B_OR), {"inside_OI": inside, "ordered": ctx.ordered}
                buffer = effective_weight(weight_OI, *factors, ctx.scaling, mask_packed, **how).to(x.dtype)
            if ctx.needs_input_grad[0] and buffer is not None:
                grad_x = (grad_TO @ buffer).view(x.shape).to(ctx.input_dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias = grad_TO.sum(dim=0).to(bias.dtype)
            if train_adapter:
                x_TI = x.reshape(-1, x.shape[-1])
                grad_OT = grad_TO.T
                if weight_OI.shape.numel() >= _LARGE and x.device.type == "cpu":
                    grad_OT = grad_OT.contiguous()
                if buffer is None or not buffer.is_contiguous():
                    gradient = grad_OT @ x_TI
                else:
                    gradient = torch.mm(grad_OT, x_TI, out=buffer)
                grad_A, grad_B = adapter_gradients(gradient, lora_A_RI, lora_B_OR, ctx.scaling, mask_packed, inside)
                grad_A, grad_B = grad_A.to(lora_A_RI.dtype), grad_B.to(lora_B_OR.dtype)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None, None


def project(
    x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool = False
) -> torch.Tensor:
    """Return x Wᵀ + bias by the matmul that a stock linear runs, or with `transposed` a stock Conv1D."""
    if not transposed:
        return functional.linear(x, weight_OI, bias)
    flat = x.reshape(-1, x.shape[-1])
    product = flat @ weight_OI.T if bias is None else torch.addmm(bias, flat, weight_OI.T)
    return product.view(*x.shape[:-1], -1)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that a linear of x computes in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class FrozenLinear(torch.autograd.Function):
    """y = x Ŵᵀ + bias of a frozen quantised weight, dequantised in forward and again in backward, never saved.

    The arguments of :meth:`apply` are (x, weight, bias).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: D102
        compute = _compute_dtype(x)
        ctx.weight, ctx.compute, ctx.input_dtype = weight, compute, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(compute)
            return functional.linear(x.to(compute), dequantized(weight).to(compute), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = grad_y.to(ctx.compute) @ dequantized(ctx.weight).to(ctx.compute)
        return grad_x.to(ctx.input_dtype), None, None


@torch.no_grad()
def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """Return Ŵ [O, I] in the weight's dtype, made in chunks that fit the cache, or by a kernel."""
    if (kernels := kernels_on(weight.device, weight.dtype)) is not None:
        return kernels.dequantized(weight)  # type: ignore[no-any-return]
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows, columns = weight.shape
    for chunk in row_chunks(rows, columns, weight.device, _CHUNK_BYTES, itemsize=4):
        result[chunk] = weight.dequantize_rows(chunk)
    return result
