"""Products of a few rows with a weight that stays as it is stored, on x86 processors: BF16 or 4 bits, sparse or not.

Decoding reads every weight for each token, so its speed is that of reading: fewer bytes are fewer milliseconds. The
weights that are multiplied are those of the dequantised model to the bit, and sums are float32; only their order
differs from PyTorch's, and does not depend on the number of threads. Many rows (a prompt) take the weight written out
in bfloat16, and PyTorch's own product.

`decode.cpp` is built at first use (:mod:`sqft.kernels.build`), for AVX-512 or AVX2. Where that is impossible, one line
says why, and PyTorch's path is taken.
Its threads are those of the OpenMP runtime that PyTorch has loaded, as many as PyTorch uses: no second pool.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from sqft.kernels import build

ROWS = 8
"""Rows of x at most; from there on PyTorch's products of a written weight are faster."""
SLACK = 64
"""Bytes behind a sparse form's values that the kernel may read."""
_BF16, _SPARSE_BF16, _INT4, _SPARSE_INT4 = range(4)
_LANES, _WIDEST = 16, 1024
_WORTH_SHARING = 1 << 17  # weights times rows from which waking other threads pays
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_FLAGS = ("-mbmi2", "-mfma", "-mf16c", "-mpopcnt")
_ALLOWED = ContextVar("decoding by the kernel", default=True)


@dataclass(frozen=True)
class Stored:
    """A weight [O, I] as it is stored; W = ceil(I / 64), G groups of I / G columns.

    Attributes:
        shape: (O, I).
        values: BF16 [O, I]; of a sparse one its kept values in order, int16 [K]; codes of 4 bits in bytes: dense from
            :func:`sqft.core.grid.pack_codes` [O, I / 2], sparse in the layout of :class:`sqft.core.sparse.Bitmask`.
            Sparse ones have `SLACK` bytes more.
        mask: int64 [O, W] of a sparse weight.
        ends: int32 [O], where in `values` a row ends, of a sparse weight.
        scale: the scales' bytes, uint8 [O, G · itemsize], of codes.
        zero: uint8 [O, G], of codes.
        scale_dtype: of the scales.
    """

    shape: tuple[int, int]
    values: torch.Tensor
    mask: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    scale_dtype: torch.dtype = torch.bfloat16

    @cached_property
    def fits(self) -> bool:
        """Whether the kernel takes this shape: of codes, sixteen neighbouring columns must share a group."""
        if self.zero is None:
            return True
        columns, group = self.shape[1], self.shape[1] // self.zero.shape[1]
        return columns % 32 == 0 and group % _LANES == 0 and (self.mask is None or _WIDEST % group == 0)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x Wᵀ + bias, in x's dtype: bfloat16 or float32; each sum is float32 and is rounded once."""
        found: torch.Tensor = torch.ops.sqft.stored_product(x, bias, *self._arguments)
        return found

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x Wᵀ + bias of an x that the kernel takes: a few rows by it, many by PyTorch's own product."""
        return self.product(x, bias) if few(x) else functional.linear(x, self.weight().to(x.dtype), bias)

    def weight(self) -> torch.Tensor:
        """Return W [O, I] in bfloat16."""
        found: torch.Tensor = torch.ops.sqft.stored_weight(*self._arguments)
        return found

    @cached_property
    def _arguments(self) -> tuple[Any, ...]:
        tensors = self.values, self.mask, self.ends, self.scale, self.zero
        return (*tensors, *self.shape, _TYPES[self.scale_dtype])


def available() -> bool:
    """Return whether weights can be multiplied as they are stored; the first call may build the kernel."""
    return _ALLOWED.get() and KERNEL.library() is not None


def few(x: torch.Tensor) -> bool:
    """Return whether x [..., I] has so few rows that the kernel multiplies faster than PyTorch."""
    return x.numel() <= ROWS * x.shape[-1]


def takes(x: torch.Tensor) -> bool:
    """Return whether a stored weight is multiplied with x [..., I]: on a CPU, without gradient and autocast."""
    return (
        x.numel() > 0
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


@contextmanager
def stock() -> Iterator[None]:
    """Take PyTorch's path inside the block, so that products are the same everywhere."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def _load() -> ctypes.CDLL | str:
    """Return the kernel, built if need be, or why there is none."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the kernel is for x86-64 with AVX2, this is {platform.machine()}"
    vectors = build.VECTORS.get(build.processor())
    if vectors is None:
        return "the processor has no AVX2"
    library = build.load("decode", "decoding", *_FLAGS, *vectors)
    if isinstance(library, str):
        return library
    if not library.sqft_supported():
        return "the processor has no BMI2 or no FMA"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.sqft_multiply.argtypes = [*(pointer,) * 4, *(number,) * 3]
    library.sqft_write.argtypes = [pointer, pointer, number]
    return library


KERNEL = build.Kernel(_load, "weights are decompressed to decode")


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("form", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("values", "mask", "ends", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("scale_type", "group")),
    )


def _described(values, mask, ends, scale, zero, rows, columns, scale_type):
    """Return what the kernel is told of a weight."""
    form = (_BF16 if zero is None else _INT4) + (mask is not None)
    group = 0 if zero is None else columns // zero.shape[1]
    parts = [None if part is None else part.data_ptr() for part in (values, mask, ends, scale, zero)]
    return ctypes.byref(_Weight(form, rows, columns, *parts, scale_type, group))


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_SHARING else 1


def _product(x, bias, values, mask, ends, scale, zero, rows, columns, scale_type):
    library = KERNEL.library()
    assert library is not None
    x = x.contiguous()
    count = x.numel() // columns
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    weight = _described(values, mask, ends, scale, zero, rows, columns, scale_type)
    pointers = x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    if library.sqft_multiply(weight, *pointers, count, _TYPES[x.dtype], _threads(count * rows * columns)):
        raise MemoryError(f"no memory for {count} rows of {columns} numbers")
    return y


def _written(values, mask, ends, scale, zero, rows, columns, scale_type):
    library = KERNEL.library()
    assert library is not None
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    weight = _described(values, mask, ends, scale, zero, rows, columns, scale_type)
    library.sqft_write(weight, out.data_ptr(), _threads(rows * columns))
    return out


# Not torch.library.custom_op, whose wrapper takes 53 µs a call against these 18: a small model's product takes 30.
_OPERATORS = torch.library.Library("sqft", "FRAGMENT")
_STORED = (
    "Tensor values, Tensor? mask, Tensor? ends, Tensor? scale, Tensor? zero, int rows, int columns, int scale_type"
)
_OPERATORS.define(f"stored_product(Tensor x, Tensor? bias, {_STORED}) -> Tensor")
_OPERATORS.define(f"stored_weight({_STORED}) -> Tensor")
_OPERATORS.impl("stored_product", _product, "CPU")
_OPERATORS.impl("stored_weight", _written, "CPU")


@torch.library.register_fake("sqft::stored_product")
def _(x, bias, values, mask, ends, scale, zero, rows, columns, scale_type):
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("sqft::stored_weight")
def _(values, mask, ends, scale, zero, rows, columns, scale_type):
    return values.new_empty(rows, columns, dtype=torch.bfloat16)
