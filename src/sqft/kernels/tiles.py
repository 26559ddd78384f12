"""What the kernels of this room share: bits of a tile, rounding, and the card to launch on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def bits_of(bits_ptr, row, i, ok, stride):
    """Return the bits of columns i of a row of bytes, as int32 0 or 1."""
    byte = tl.load(bits_ptr + row * stride + (i // 8)[None, :], mask=ok, other=0).to(tl.int32)
    return (byte >> (i % 8)[None, :]) & 1


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 to a dtype, half to even; to bfloat16 in integers, because the interpreter's cast truncates."""
    if dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        u = tl.where(x == x, u, 0x7FC0)  # the carry would make some NaN a zero
        return u.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


def as_bytes(bits: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Return the bits contiguous; a kernel without them is given some tensor that it does not read."""
    return stand_in if bits is None else bits.contiguous()


def device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
