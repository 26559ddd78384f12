"""Layouts of a sparse matrix in which its zeros take a bit or less, and its non-zeros lie in order.

    bitmask   a bit a weight; then the non-zeros of each row, one after the other
    2:4       of each four weights two; three bits say which two (six patterns)

A kernel reads both in place. A float's zero is the value whose bits are all 0: -0.0 is kept as a value. The zero of a
code is the zero point of its group. Codes of 4 bits take half a byte each, and those of a group begin at a whole byte.
A compiled kernel does the work where there is one (:mod:`sqft.kernels.sparse`), PyTorch elsewhere, to the same bytes.

Shapes: O rows, I columns, G groups of I / G columns, W = ceil(I / 64) words of a row's mask, K values that are kept,
B = I · bits / 8 bytes of a row, P = 3 · ceil(I / 32) bytes of its patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from sqft.core.mask import pack_mask, unpack_mask
from sqft.kernels import sparse as kernel

WORD = 64
MOST = 2**31 - 1
"""Values that offsets can count."""
_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class Bitmask:
    """A matrix as a mask and its non-zeros.

    Attributes:
        mask_OW: int64, bit i of word w is column 64 w + i: 1 where the value is kept.
        values_K: the kept values in order: the matrix's own integers, or bytes of two 4-bit codes each, low one first.
        offsets_O: int32 [O], where in `values_K` a row ends.
    """

    mask_OW: torch.Tensor
    values_K: torch.Tensor
    offsets_O: torch.Tensor

    def kept(self, columns: int) -> torch.Tensor:
        """Return the mask as bool [O, I]."""
        return unpack_mask(self.mask_OW.view(torch.uint8), columns)


@dataclass(frozen=True)
class TwoOfFour:
    """A matrix of which each four weights in a row hold at most two non-zeros.

    Attributes:
        patterns_OP: uint8 [O, P], three bits a four, in little-endian order along the row.
        values_K: the two values of each four in order, as in :class:`Bitmask`.
    """

    patterns_OP: torch.Tensor
    values_K: torch.Tensor


@dataclass(frozen=True)
class Integers:
    """What the integers of a matrix are, whose rows are little-endian bytes [O, B]: a float's bits, or codes.

    Attributes:
        bits: 4, 8, 16 or 32 of each.
        columns: I.
        group: columns that share a zero; of 4 bits, each group's kept values begin at a whole byte. None of floats.
        zero_OG: uint8 [O, ceil(I / group)]; None: all zeros are 0.
    """

    bits: int
    columns: int
    group: int | None = None
    zero_OG: torch.Tensor | None = None

    @property
    def halves(self) -> int | None:
        """The group, where values are half bytes."""
        return (self.group or self.columns) if self.bits == 4 else None

    def split(self, bytes_OB: torch.Tensor) -> torch.Tensor:
        """Return the integers [O, I], half bytes as a byte each."""
        return _bytes_to_pairs(bytes_OB) if self.bits == 4 else bytes_OB.contiguous().view(_INTEGERS[self.bits])

    def join(self, values_OI: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`split`."""
        values_OI = values_OI.contiguous()
        return _pairs_to_bytes(values_OI) if self.bits == 4 else values_OI.view(torch.uint8)

    def zeros(self, rows: int) -> torch.Tensor:
        """Return a matrix of zeros, [O, I]."""
        if self.zero_OG is None or self.group is None:
            return torch.zeros(rows, self.columns, dtype=_INTEGERS.get(self.bits, torch.uint8))
        return self.zero_OG.repeat_interleave(self.group, dim=1)[:, : self.columns].contiguous()


def nonzeros(bytes_OB: torch.Tensor, kind: Integers) -> torch.Tensor:
    """Return which integers are not zero, as the words of a mask, int64 [O, W]."""
    found = kernel.nonzeros(bytes_OB, kind.bits, kind.group, kind.zero_OG)
    return mask_words(kind.split(bytes_OB) != kind.zeros(len(bytes_OB))) if found is None else found


def compress(bytes_OB: torch.Tensor, kind: Integers, mask_OW: torch.Tensor) -> Bitmask:
    """Return a matrix in the bitmask layout; what the mask does not keep is not stored."""
    found = kernel.compress(bytes_OB, kind.bits, mask_OW, kind.group)
    if found is None:
        kept_OI = unpack_mask(mask_OW.view(torch.uint8), kind.columns)
        return to_bitmask(kind.split(bytes_OB), kept_OI, group=kind.halves)
    return Bitmask(mask_OW, found[0], found[1].to(torch.int32))


def expand(packed: Bitmask, kind: Integers, *, in_order: bool = False) -> torch.Tensor:
    """Undo :func:`compress`: return the bytes, uint8 [O, B].

    Args:
        packed: the matrix.
        kind: of its integers.
        in_order: half bytes follow each other through a row, in whatever groups, as those of :func:`as_bitmask` do.
    """
    form = kind.bits, kind.columns, kind.group, kind.zero_OG
    found = kernel.expand(packed.values_K, packed.mask_OW, *form)
    if found is None:
        halves = kind.columns if in_order and kind.bits == 4 else kind.halves
        return kind.join(from_bitmask(packed, kind.zeros(len(packed.mask_OW)), group=halves))
    return found


def expands_to(packed: Bitmask, kind: Integers, bytes_OB: torch.Tensor, *, in_order: bool = False) -> bool:
    """Return whether :func:`expand` gives these bytes."""
    found = kernel.expands(packed.values_K, packed.mask_OW, bytes_OB, kind.bits, kind.group, kind.zero_OG)
    return torch.equal(expand(packed, kind, in_order=in_order), bytes_OB) if found is None else found


def to_bitmask(values_OI: torch.Tensor, kept_OI: torch.Tensor, *, group: int | None = None) -> Bitmask:
    """Return a matrix in the bitmask layout, by PyTorch alone.

    Args:
        values_OI: integers (of a float its bits).
        kept_OI: bool; what is not kept is not stored.
        group: columns of a group, for 4-bit codes of which two share a byte; None keeps whole integers.
    """
    mask_OW = mask_words(kept_OI)
    if group is None:
        return Bitmask(mask_OW, values_OI[kept_OI], kept_OI.sum(dim=1).cumsum(0, dtype=torch.int32))
    kept_OGS = kept_OI.unflatten(1, (-1, group))
    bytes_OG = (kept_OGS.sum(dim=2) + 1) // 2
    ends_N = bytes_OG.flatten().cumsum(0)
    place = _nibble_places(kept_OGS, ends_N - bytes_OG.flatten())[kept_OI]
    nibbles = torch.zeros(2 * int(ends_N[-1]), dtype=torch.uint8)
    nibbles[place] = values_OI[kept_OI]
    offsets_O = ends_N.view_as(bytes_OG)[:, -1].to(torch.int32)
    return Bitmask(mask_OW, _pairs_to_bytes(nibbles), offsets_O.contiguous())


def from_bitmask(packed: Bitmask, zeros_OI: torch.Tensor, *, group: int | None = None) -> torch.Tensor:
    """Undo :func:`to_bitmask`.

    Args:
        packed: the matrix.
        zeros_OI: what stands where nothing is kept; it is written into and returned.
        group: as there.
    """
    kept_OI = packed.kept(zeros_OI.shape[1])
    if group is None:
        zeros_OI[kept_OI] = packed.values_K
        return zeros_OI
    kept_OGS = kept_OI.unflatten(1, (-1, group))
    bytes_N = ((kept_OGS.sum(dim=2) + 1) // 2).flatten()
    place = _nibble_places(kept_OGS, bytes_N.cumsum(0) - bytes_N)[kept_OI]
    zeros_OI[kept_OI] = _bytes_to_pairs(packed.values_K)[place]
    return zeros_OI


def mask_words(kept_OI: torch.Tensor) -> torch.Tensor:
    """Return a mask as int64 words [O, W]; see :class:`Bitmask`."""
    padded = torch.nn.functional.pad(kept_OI, (0, -kept_OI.shape[1] % WORD))
    return pack_mask(padded.contiguous()).view(torch.int64)


def mask_bytes(mask_OW: torch.Tensor, columns: int) -> torch.Tensor:
    """Return a mask's words as a stored mask, uint8 [O, ceil(I / 8)]; see :func:`sqft.core.mask.pack_mask`."""
    return mask_OW.contiguous().view(torch.uint8)[:, : -(-columns // 8)]


def words_of_bytes(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo :func:`mask_bytes`; bits behind the columns are dropped."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 8))
    return padded.contiguous().view(torch.int64) & within(columns)


@lru_cache(maxsize=64)
def within(columns: int) -> torch.Tensor:
    """Return the words [W] of a row's mask that keeps every column."""
    return mask_words(torch.ones(1, columns, dtype=torch.bool))[0]


def row_ends(mask_OW: torch.Tensor, columns: int, *, group: int | None = None) -> torch.Tensor:
    """Return where in `values_K` each row ends by its mask, int64 [O]; half bytes have a group."""
    found = kernel.ends(mask_OW, 8 if group is None else 4, columns, group)
    if found is not None:
        return found
    if group is not None and group % 8:
        counts = unpack_mask(mask_OW.view(torch.uint8), columns)
    else:
        counts = mask_bytes(_byte_counts(mask_OW), columns)
    if group is not None:
        counts = (counts.unflatten(1, (columns // group, -1)).sum(dim=2) + 1) // 2
    return counts.sum(dim=1).cumsum(0)


def kept_values(mask_OW: torch.Tensor) -> int:
    """Return how many values a mask keeps."""
    found = kernel.count(mask_OW)
    return int(_byte_counts(mask_OW).view(torch.uint8).sum()) if found is None else found


def at_most_two_of_four(mask_OW: torch.Tensor) -> bool:
    """Return whether a mask keeps at most two of each four columns."""
    found = kernel.two_of_four(mask_OW)
    if found is None:
        found = not bool((_four_counts(mask_OW) + 0x1111111111111111 & 0x4444444444444444).any())
    return found


def to_two_of_four(bytes_OB: torch.Tensor, kind: Integers, mask_OW: torch.Tensor) -> TwoOfFour:
    """Return a matrix in the 2:4 layout; of fours with fewer non-zeros, zeros are stored as values.

    Args:
        bytes_OB: the matrix, I divisible by 4.
        kind: of its integers.
        mask_OW: at most two of each four.

    Raises:
        ValueError: a four keeps more than two.
    """
    if not at_most_two_of_four(mask_OW):
        raise ValueError("a group of four keeps more than two weights")
    stretches = mask_OW.view(torch.uint8)[:, : 4 * -(-kind.columns // 32)]  # of 32 columns, whose patterns are 24 bits
    six = _looked_up(_patterns_of_byte(), stretches).unflatten(1, (-1, 4)).to(torch.int32)
    words = six[..., 0] | six[..., 1] << 6 | six[..., 2] << 12 | six[..., 3] << 18
    patterns = torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=2).to(torch.uint8).flatten(1)
    in_order = Integers(kind.bits, kind.columns)  # two half bytes of each four are a byte, in whatever groups
    return TwoOfFour(patterns, compress(bytes_OB, in_order, kept_of_patterns(patterns, kind.columns)).values_K)


def as_bitmask(packed: TwoOfFour, columns: int, *, halves: bool = False) -> Bitmask:
    """Return a matrix in the bitmask layout, whose values are the same: two of each four.

    Args:
        packed: the matrix.
        columns: I.
        halves: the values are half bytes: the two of a four share a byte.
    """
    rows, each = len(packed.patterns_OP), columns // (4 if halves else 2)
    offsets_O = torch.arange(each, (rows + 1) * each, each).to(torch.int32)
    return Bitmask(kept_of_patterns(packed.patterns_OP, columns), packed.values_K[: rows * each], offsets_O)


def kept_of_patterns(patterns_OP: torch.Tensor, columns: int) -> torch.Tensor:
    """Return which two of each four are stored, as the words of a mask, int64 [O, W]."""
    shifts = torch.arange(0, 24, 6, dtype=torch.int32)
    six = _pattern_words(patterns_OP).unsqueeze(2) >> shifts & 63
    return words_of_bytes(_looked_up(_byte_of_patterns(), six.flatten(1)), columns)


def are_patterns(patterns_OP: torch.Tensor) -> bool:
    """Return whether all three bits are one of the six patterns."""
    words = _pattern_words(patterns_OP)
    return not bool((words >> 1 & words >> 2 & 0o11111111).any())


def _pattern_words(patterns_OP: torch.Tensor) -> torch.Tensor:
    """Return the patterns of 32 columns each, int32 [O, P / 3]."""
    parts = patterns_OP.unflatten(1, (-1, 3)).to(torch.int32)
    found: torch.Tensor = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    return found


def _looked_up(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, places.flatten().to(torch.int32)).view(places.shape)


@cache
def _patterns_of_byte() -> torch.Tensor:
    """Return uint8 [256]: of a mask's byte the patterns of its two fours, the first pairs that hold what they keep."""
    first = []
    for places in range(16):
        holding = [i for i, pair in enumerate(_PAIRS) if all(k in pair for k in range(4) if places >> k & 1)]
        first.append(holding[0] if holding else 0)
    return torch.tensor([first[byte & 15] | first[byte >> 4] << 3 for byte in range(256)], dtype=torch.uint8)


@cache
def _byte_of_patterns() -> torch.Tensor:
    """Return uint8 [64]: of two patterns the mask's byte."""
    kept = [*(1 << i | 1 << k for i, k in _PAIRS), 0, 0]
    return torch.tensor([kept[two & 7] | kept[two >> 3] << 4 for two in range(64)], dtype=torch.uint8)


def _four_counts(mask_OW: torch.Tensor) -> torch.Tensor:
    """Return how many of each four columns a mask keeps, in four bits each."""
    pairs = mask_OW - (mask_OW >> 1 & 0x5555555555555555)
    return (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333)


def _byte_counts(mask_OW: torch.Tensor) -> torch.Tensor:
    """Return how many of each eight columns a mask keeps, in eight bits each."""
    fours = _four_counts(mask_OW)
    return fours + (fours >> 4) & 0x0F0F0F0F0F0F0F0F


def _nibble_places(kept_OGS: torch.Tensor, starts_N: torch.Tensor) -> torch.Tensor:
    """Return, for each kept weight [O, I], the number of its half byte: its group's first one and those before it."""
    before = kept_OGS.to(torch.int32).cumsum(dim=2, dtype=torch.int32) - 1
    return (2 * starts_N.view(*kept_OGS.shape[:2], 1) + before).flatten(1)


def _pairs_to_bytes(nibbles: torch.Tensor) -> torch.Tensor:
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _bytes_to_pairs(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
