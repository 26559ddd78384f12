"""The layouts of a stored tensor in an archive: which takes the fewest bytes, and the way back.

A float's integers are its bits. A quantised weight's integers are its codes, which both packed formats keep in int32
words: little-endian ones, so that in INT4 a byte is two codes, the low one first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch

from sqft.core.mask import conforms, pack_mask, unpack_mask
from sqft.core.sparse import (
    MOST,
    Bitmask,
    TwoOfFour,
    from_bitmask,
    from_two_of_four,
    kept_of_patterns,
    to_bitmask,
    to_two_of_four,
)

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
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

    def unpack(self, words: torch.Tensor) -> torch.Tensor:
        """Return the codes, uint8 [O, I], of stored words."""
        codes = _nibbles(words.T.contiguous() if self.rows_last else words, self.bits)
        return codes

    def pack(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`unpack`."""
        packed = codes_OI if self.bits == 8 else codes_OI[:, 0::2] | codes_OI[:, 1::2] << 4
        words = packed.contiguous().view(torch.int32)
        return words.T.contiguous() if self.rows_last else words

    def zero_OI(self, read: Callable[[str], torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """Return the code of zero for every weight, uint8 [O, I]; `read` returns a tensor of the model."""
        rows, columns = shape
        if self.zeros is None:
            return torch.full(shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        words = read(self.zeros)
        zero_GO = _nibbles(words if self.rows_last else words.T.contiguous(), self.bits)[:, :rows]
        return (zero_GO.T + self.less).repeat_interleave(self.group, dim=1)[:, :columns].contiguous()


def _nibbles(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers, uint8 [R, C], that int32 words [R, C·n/32] hold along their last axis."""
    packed = words.contiguous().view(torch.uint8)
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)


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
    def group(self) -> int | None:
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
        codes = None if self.codes is None else asdict(self.codes)
        said = {"layout": self.layout, "crc32": self.crc() or None, "codes": codes, "weight": self.weight}
        return {name: value for name, value in said.items() if value is not None}


class Source(Protocol):
    """A model's tensors, as they are stored."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        ...

    def kept(self, name: str) -> torch.Tensor:
        """Return the mask that a packed weight's layout holds, bool [O, I]."""
        ...


def encode(tensor: torch.Tensor, codes: Codes | None, source: Source, mask: torch.Tensor | None = None) -> Packed:
    """Return a tensor in the layout that takes the fewest bytes.

    Args:
        tensor: as stored.
        codes: how its words hold codes; None for a tensor of values.
        source: has its zero points.
        mask: which of its weights were kept, bool [O, I]. Where all else is zero the layout keeps these, zeros among
            them: the stored mask then takes no room of its own.
    """
    as_it_is = Packed("plain", {"": tensor})
    if tensor.dim() != 2 or tensor.numel() == 0 or tensor.itemsize not in INTEGERS:
        return as_it_is
    if codes is None:
        values = tensor.contiguous().view(INTEGERS[tensor.itemsize])
        kept = values != 0
    else:
        values = codes.unpack(tensor)
        kept = values != codes.zero_OI(source.read, (values.shape[0], values.shape[1]))
    if mask is not None and mask.shape == kept.shape and bool((mask | ~kept).all()):
        kept = mask
    return min((as_it_is, *_sparse(values, kept, codes)), key=lambda one: one.size)


def _sparse(values: torch.Tensor, kept: torch.Tensor, codes: Codes | None) -> Iterator[Packed]:
    group = Packed("plain", {}, codes).group
    if values.shape[1] % 4 == 0 and conforms(kept, 2, 4):
        two = to_two_of_four(values, kept, nibbles=group is not None)
        yield Packed("2:4", {".patterns": _padded(two.patterns_OP), ".values": _padded(two.values_OV)}, codes)
    elif int(kept.sum()) < min(0.97 * kept.numel(), MOST):  # a mask takes a bit of 32 at the least
        packed = to_bitmask(values, kept, group=group)
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
    """Return the mask that a layout holds, bool [O, I]; of a tensor that is stored as it was all True.

    Args:
        packed: an archive's parts.
        shape: as stored.
    """
    rows, columns = shape_of(shape, packed.codes)
    if packed.layout == "bitmask":
        return unpack_mask(packed.parts[".mask"].view(torch.uint8), columns)
    if packed.layout == "2:4":
        return kept_of_patterns(_patterns(packed, rows, columns), columns)
    return torch.ones(rows, columns, dtype=torch.bool)


def _patterns(packed: Packed, rows: int, columns: int) -> torch.Tensor:
    width = 3 * math.ceil(columns / 32)
    return packed.parts[".patterns"][: rows * width].view(rows, width)


def decode(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype, source: Source) -> torch.Tensor:
    """Return a tensor as it was.

    Args:
        packed: from :func:`encode`, or an archive's parts.
        shape: as stored.
        dtype: as stored.
        source: as there.
    """
    codes, group = packed.codes, packed.group
    if packed.layout == "plain":
        return packed.parts[""]
    if packed.layout == "mask":
        assert packed.weight is not None
        return pack_mask(source.kept(packed.weight))
    if packed.layout == "nonzeros":
        assert packed.weight is not None
        return pack_mask(source.read(packed.weight) != 0)
    rows, columns = matrix = shape_of(shape, codes)
    integers = INTEGERS[dtype.itemsize]
    zeros = torch.zeros(matrix, dtype=integers) if codes is None else codes.zero_OI(source.read, matrix)
    values = packed.parts[".values"]
    if packed.layout == "2:4":
        width = columns // (2 if group is None else 4)
        two = TwoOfFour(_patterns(packed, rows, columns), values[: rows * width].view(rows, width))
        found = from_two_of_four(two, zeros, nibbles=group is not None)
    else:
        offsets = packed.parts[".offsets"][:rows]
        found = from_bitmask(Bitmask(packed.parts[".mask"], values[: int(offsets[-1])], offsets), zeros, group=group)
    return found.view(dtype) if codes is None else codes.pack(found)


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
    return torch.nn.functional.pad(flat, (0, -flat.numel() % (8 // flat.itemsize)))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
