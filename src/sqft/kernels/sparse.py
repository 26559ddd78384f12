"""The compiled path of :mod:`sqft.core.sparse`'s bitmask layout, on x86 processors with BMI2: eight bytes at a time.

Packing is then as fast as memory, where PyTorch's masked reading takes a nanosecond and more a weight. Each function
returns None where the kernel cannot be had or does not take the matrix, and PyTorch's path is taken.
"""

from __future__ import annotations

import ctypes
import platform

import torch

from sqft.kernels import build

_ROOM = 9  # bytes behind the values that the kernel may write
_WORD = 64
_ALL = 2**62  # columns of a group that never ends
_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bits", "rows", "columns", "group")),
        *((name, ctypes.c_void_p) for name in ("zero", "bytes", "mask", "values")),
        ("size", ctypes.c_int64),
    )


def _load() -> ctypes.CDLL | str:
    """Return the kernel, built if need be, or why there is none."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the kernel is for x86-64 with BMI2, this is {platform.machine()}"
    library = build.load("sparse", "packing", "-mbmi2", "-mpopcnt")
    if isinstance(library, str) or library.sqft_supported():
        return library
    return "the processor has no BMI2"


KERNEL = build.Kernel(_load, "archives are packed and unpacked by PyTorch")


def nonzeros(
    bytes_OB: torch.Tensor, bits: int, group: int | None = None, zero_OG: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return which values are not zero, int64 [O, W].

    Args:
        bytes_OB: uint8 [O, I · bits / 8].
        bits: 4, 8, 16 or 32 of a value.
        group: columns that share a zero, and of which 4-bit values begin at a whole byte.
        zero_OG: uint8 [O, G]; None: zeros are 0.
    """
    rows, columns = bytes_OB.shape[0], bytes_OB.shape[1] * 8 // bits
    if not _takes(bytes_OB, bits, columns, group, zero_OG):
        return None
    mask_OW = torch.zeros(rows, -(-columns // _WORD), dtype=torch.int64)
    _call("mark", bits, columns, group, zero_OG, bytes_OB.contiguous(), mask_OW, None)
    return mask_OW


def ends(mask_OW: torch.Tensor, bits: int, columns: int, group: int | None = None) -> torch.Tensor | None:
    """Return where in the kept values, or bytes of two 4-bit ones, each row ends, int64 [O]."""
    if not _takes(mask_OW, bits, columns, group):
        return None
    ends_O = torch.empty(len(mask_OW), dtype=torch.int64)
    _call("ends", bits, columns, group, None, None, mask_OW.contiguous(), None, ends_O.data_ptr())
    return ends_O


def count(mask_OW: torch.Tensor) -> int | None:
    """Return how many bits of a mask are 1."""
    return _of_mask("count", mask_OW)


def two_of_four(mask_OW: torch.Tensor) -> bool | None:
    """Return whether each four bits of a mask have at most two."""
    found = _of_mask("two_of_four", mask_OW)
    return None if found is None else bool(found)


def _of_mask(name: str, mask_OW: torch.Tensor) -> int | None:
    library = KERNEL.library()
    if library is None or mask_OW.device.type != "cpu":
        return None
    mask_OW = mask_OW.contiguous()
    function = getattr(library, f"sqft_{name}")
    function.restype = ctypes.c_int64
    return int(function(ctypes.c_void_p(mask_OW.data_ptr()), ctypes.c_int64(mask_OW.numel())))


def compress(
    bytes_OB: torch.Tensor, bits: int, mask_OW: torch.Tensor, group: int | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the values that a mask keeps, in order, and where each row ends, int64 [O].

    Args:
        bytes_OB: as in :func:`nonzeros`.
        bits: as there.
        mask_OW: int64 [O, W], without bits behind the columns.
        group: as there.

    Returns:
        Integers, or bytes of two 4-bit ones each, and the ends.
    """
    columns = bytes_OB.shape[1] * 8 // bits
    ends_O = ends(mask_OW, bits, columns, group)
    if ends_O is None:
        return None
    size = int(ends_O[-1]) * max(1, bits // 8)
    values = torch.empty(size + _ROOM, dtype=torch.uint8)
    _call("compress", bits, columns, group, None, bytes_OB.contiguous(), mask_OW.contiguous(), values)
    return values[:size].view(_INTEGERS.get(bits, torch.uint8)), ends_O


def expand(
    values_K: torch.Tensor,
    mask_OW: torch.Tensor,
    bits: int,
    columns: int,
    group: int | None = None,
    zero_OG: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Undo :func:`compress`: return the matrix, uint8 [O, I · bits / 8]; too few values are made up by zeros."""
    if not _takes(values_K, bits, columns, group, zero_OG):
        return None
    bytes_OB = torch.empty(mask_OW.shape[0], columns * bits // 8, dtype=torch.uint8)
    _call("expand", bits, columns, group, zero_OG, bytes_OB, mask_OW.contiguous(), values_K.contiguous())
    return bytes_OB


def expands(
    values_K: torch.Tensor,
    mask_OW: torch.Tensor,
    bytes_OB: torch.Tensor,
    bits: int,
    group: int | None = None,
    zero_OG: torch.Tensor | None = None,
) -> bool | None:
    """Return whether :func:`expand` gives these bytes, which takes no memory of their size."""
    columns = bytes_OB.shape[1] * 8 // bits
    if not _takes(values_K, bits, columns, group, zero_OG):
        return None
    parts = bytes_OB.contiguous(), mask_OW.contiguous(), values_K.contiguous()
    return bool(_call("expands", bits, columns, group, zero_OG, *parts))


def _takes(
    tensor: torch.Tensor, bits: int, columns: int, group: int | None, zero_OG: torch.Tensor | None = None
) -> bool:
    whole = group is None or (columns % group == 0 and group * bits % _WORD == 0)
    # GPTQ's first format can say 16 of four bits: a zero that no code is.
    beyond = zero_OG is not None and bits == 4 and int(zero_OG.max()) > 15
    on_cpu = tensor.device.type == "cpu" and columns * bits % 8 == 0
    return whole and on_cpu and not beyond and KERNEL.library() is not None


def _call(
    name: str,
    bits: int,
    columns: int,
    group: int | None,
    zero_OG: torch.Tensor | None,
    bytes_OB: torch.Tensor | None,
    mask_OW: torch.Tensor,
    values: torch.Tensor | None,
    *more: int,
) -> int:
    library = KERNEL.library()
    assert library is not None
    zero_OG = None if zero_OG is None else zero_OG.contiguous()
    tensors = zero_OG, bytes_OB, mask_OW, values
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    matrix = _Matrix(bits, mask_OW.shape[0], columns, group or _ALL, *pointers, 0 if values is None else values.nbytes)
    found: int = getattr(library, f"sqft_{name}")(ctypes.byref(matrix), *map(ctypes.c_void_p, more))
    return found
