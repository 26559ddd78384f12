"""The layouts of a stored tensor in an archive: which takes the fewest bytes, and the way back.

A float's integers are its bits. A quantised weight's integers are its codes, which both packed formats keep in int32
words: little-endian ones, so that in INT4 a byte is two codes, the low one first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from sqft.core.mask import pack_mask
from sqft.core.sparse import (
    MOST,
    Bitmask,
    Integers,
    TwoOfFour,
    as_bitmask,
    at_most_two_of_four,
    compress,
    expand,
    expands_to,
    kept_of_patterns,
    kept_values,
    nonzeros,
    to_two_of_four,
    within,
    words_of_bytes,
)

_WIDTHS = (1, 2, 4)
"""Bytes of the values that a layout takes."""
PARTS = {
    "plain": ("",),
    "bitmask": (".mask", ".values", ".offsets"),
    "2:4": (".patterns", ".values"),
    "mask": (),
    "nonzeros": (),
}
"""Of each layout the names of its parts, after the tensor's own."""


@dataclass(frozen=True)
class Codes:
    """How the stored words of a quantised weight hold its codes.

    Attributes:
        bits: 4 or 8.
        group: columns that share a zero point.
        zeros: the tensor of packed zero points; None where all are 2ⁿ⁻¹.
        rows_last: the words run along the rows, as GPTQ's do: `qweight` [I, O] and `qzeros` [G, O].
        less: what was taken from the zero points before they were stored.
    """

    bits: int
    group: int
    zeros: str | None
    rows_last: bool = False
    less: int = 0

    def bytes_of(self, words: torch.Tensor) -> torch.Tensor:
        """Return the rows of a weight's codes, uint8 [O, I · bits / 8], of stored words."""
        return (words.T if self.rows_last else words).contiguous().view(torch.uint8)

    def words_of(self, bytes_OB: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`bytes_of`."""
        words = bytes_OB.contiguous().view(torch.int32)
        return words.T.contiguous() if self.rows_last else words

    def zero_OG(self, read: Callable[[str], torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """Return the code of zero of each group, uint8; `read` returns a tensor of the model."""
        rows, columns = shape
        if self.zeros is None:
            return torch.full((rows, math.ceil(columns / self.group)), 2 ** (self.bits - 1), dtype=torch.uint8)
        words = read(self.zeros)
        packed = (words if self.rows_last else words.T).contiguous().view(torch.uint8)
        return (
            Integers(self.bits, 8 * packed.shape[1] // self.bits).split(packed)[:, :rows].T + self.less
        ).contiguous()


Layout = Literal["plain", "bitmask", "2:4", "mask", "nonzeros"]


@dataclass(frozen=True)
class Packed:
    """A tensor as it lies in an archive.

    Attributes:
        layout: which of the module's.
        parts: {suffix: tensor}.
        codes: how its words hold codes.
        weight: of a mask, the stored tensor whose layout holds it.
    """

    layout: Layout
    parts: dict[str, torch.Tensor]
    codes: Codes | None = None
    weight: str | None = None

    @property
    def size(self) -> int:
        """Bytes of its parts."""
        return sum(part.numel() * part.itemsize for part in self.parts.values())

    @property
    def halves(self) -> int | None:
        """Columns of which the half bytes begin at a whole byte."""
        return self.codes.group if self.codes is not None and self.codes.bits == 4 else None

    def crc(self) -> int:
        """Return the CRC-32 of what says where the values are."""
        found = 0
        for suffix in sorted(self.parts.keys() - {".values", ""}):
            found = zlib.crc32(as_bytes(self.parts[suffix]), found)
        return found

    def note(self) -> dict[str, Any]:
        """Return what the header says of it."""
        codes = None if self.codes is None else vars(self.codes)
        said = {"layout": self.layout, "crc32": self.crc() or None, "codes": codes, "weight": self.weight}
        return {name: value for name, value in said.items() if value is not None}


class Source(Protocol):
    """A model's tensors, as they are stored."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        ...

    def kept(self, name: str) -> torch.Tensor:
        """Return the mask that a packed weight's layout holds, uint8 [O, ceil(I / 8)]."""
        ...


def encode(tensor: torch.Tensor, codes: Codes | None, source: Source, mask: torch.Tensor | None = None) -> Packed:
    """Return a tensor in the layout that takes the fewest bytes.

    Args:
        tensor: as stored.
        codes: how its words hold codes; None for a tensor of values.
        source: has its zero points.
        mask: which of its weights were kept, as it is stored, uint8 [O, ceil(I / 8)]. Where all else is zero the layout
            keeps these, zeros among them: the stored mask then takes no room of its own.
    """
    as_it_is = Packed("plain", {"": tensor})
    if tensor.dim() != 2 or tensor.numel() == 0 or tensor.itemsize not in _WIDTHS:
        return as_it_is
    kind = _integers(tuple(tensor.shape), tensor.dtype, codes, source)
    rows = tensor.contiguous().view(torch.uint8) if codes is None else codes.bytes_of(tensor)
    kept = nonzeros(rows, kind)
    if mask is not None and mask.shape == (len(kept), math.ceil(kind.columns / 8)):
        stored = words_of_bytes(mask, kind.columns)
        kept = kept if bool((kept & ~stored).any()) else stored
    return min((as_it_is, *_sparse(rows, kind, kept, codes)), key=lambda one: one.size)


def _integers(shape: tuple[int, ...], dtype: torch.dtype, codes: Codes | None, source: Source) -> Integers:
    """Return what the integers of a stored tensor are."""
    matrix = shape_of(shape, codes)
    if codes is None:
        return Integers(8 * dtype.itemsize, matrix[1])
    return Integers(codes.bits, matrix[1], codes.group, codes.zero_OG(source.read, matrix))


def _sparse(rows: torch.Tensor, kind: Integers, kept: torch.Tensor, codes: Codes | None) -> Iterator[Packed]:
    if kind.columns % 4 == 0 and at_most_two_of_four(kept):
        two = to_two_of_four(rows, kind, kept)
        yield Packed("2:4", {".patterns": _padded(two.patterns_OP), ".values": _padded(two.values_K)}, codes)
        return
    if kept_values(kept) < min(0.97 * len(rows) * kind.columns, MOST):  # a mask takes a bit of 32 at the least
        packed = compress(rows, kind, kept)
        parts = {
            ".mask": packed.mask_OW,
            ".offsets": _padded(packed.offsets_O),
            ".values": _padded(packed.values_K),
        }
        yield Packed("bitmask", parts, codes)


def encode_mask(mask: torch.Tensor, weight: str, source: Source) -> Packed:
    """Return a stored mask: nothing, where its weight says it; else as it is.

    A weight says it by its layout, or by which values are not zero: a 2:4 layout holds two of each four, also where one
    of them was zero before it was pruned.

    Args:
        mask: packed, uint8 [O, ceil(I / 8)].
        weight: the stored tensor of the weight or its codes.
        source: has that one's layout.
    """
    said: tuple[Packed, ...] = (Packed("mask", {}, weight=weight), Packed("nonzeros", {}, weight=weight))
    same = (packed for packed in said if torch.equal(decode(packed, (), mask.dtype, source), mask))
    return next(same, Packed("plain", {"": mask}))


def kept_of(packed: Packed, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the mask that a layout holds, int64 [O, W]; of a tensor that is stored as it was all 1.

    Args:
        packed: an archive's parts.
        shape: as stored.
    """
    rows, columns = shape_of(shape, packed.codes)
    if packed.layout == "bitmask":
        return packed.parts[".mask"]
    if packed.layout == "2:4":
        return kept_of_patterns(patterns_of(packed, rows, columns), columns)
    return within(columns).expand(rows, -1)


def patterns_of(packed: Packed, rows: int, columns: int) -> torch.Tensor:
    """Return the patterns of a 2:4 layout, uint8 [O, P]."""
    width = 3 * math.ceil(columns / 32)
    return packed.parts[".patterns"][: rows * width].view(rows, width)


def bitmask_of(packed: Packed, matrix: tuple[int, int]) -> Bitmask:
    """Return a matrix [O, I] of either sparse layout as a bitmask."""
    rows, columns = matrix
    if packed.layout == "2:4":
        two = TwoOfFour(patterns_of(packed, rows, columns), packed.parts[".values"])
        return as_bitmask(two, columns, halves=packed.halves is not None)
    offsets = packed.parts[".offsets"][:rows]
    return Bitmask(packed.parts[".mask"], packed.parts[".values"][: int(offsets[-1])], offsets)


def decode(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype, source: Source) -> torch.Tensor:
    """Return a tensor as it was.

    Args:
        packed: from :func:`encode`, or an archive's parts.
        shape: as stored.
        dtype: as stored.
        source: as there.
    """
    codes = packed.codes
    if packed.layout == "plain":
        return packed.parts[""]
    if packed.layout == "mask":
        assert packed.weight is not None
        return source.kept(packed.weight)
    if packed.layout == "nonzeros":
        assert packed.weight is not None
        return pack_mask(source.read(packed.weight) != 0)
    kind, made = _integers(shape, dtype, codes, source), bitmask_of(packed, shape_of(shape, codes))
    found = expand(made, kind, in_order=packed.layout == "2:4")
    return found.view(dtype) if codes is None else codes.words_of(found)


def gives_back(packed: Packed, tensor: torch.Tensor, source: Source) -> bool:
    """Return whether :func:`decode` gives a tensor to the bit; of a sparse layout without writing it out."""
    shape, codes = tuple(tensor.shape), packed.codes
    if packed.layout not in ("bitmask", "2:4"):
        back = decode(packed, shape, tensor.dtype, source)
        return back is tensor or torch.equal(_bytes(back), _bytes(tensor))
    rows = tensor.contiguous().view(torch.uint8) if codes is None else codes.bytes_of(tensor)
    kind, made = _integers(shape, tensor.dtype, codes, source), bitmask_of(packed, shape_of(shape, codes))
    return expands_to(made, kind, rows, in_order=packed.layout == "2:4")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def shape_of(stored: tuple[int, ...], codes: Codes | None) -> tuple[int, int]:
    """Return (O, I) of a stored tensor: of its codes, where its words hold them."""
    rows, columns = stored
    if codes is None:
        return rows, columns
    if codes.rows_last:
        rows, columns = columns, rows
    return rows, columns * 32 // codes.bits


def _padded(values: torch.Tensor) -> torch.Tensor:
    """Return values in one row, with zeros up to a multiple of 8 bytes."""
    flat = values.flatten()
    rest = -flat.numel() % (8 // flat.itemsize)
    return torch.nn.functional.pad(flat, (0, rest)) if rest else flat


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
