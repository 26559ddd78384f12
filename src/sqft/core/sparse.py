"""Layouts of a sparse matrix in which its zeros take a bit or less, and its non-zeros lie in order.

    bitmask   a bit a weight; then the non-zeros of each row, one after the other
    2:4       of each four weights two; three bits say which two (six patterns)

A kernel reads both in place. A float's zero is the value whose bits are all 0: -0.0 is kept as a value. The zero of a
code is the zero point of its group. Codes of 4 bits take half a byte each, and those of a group begin at a whole byte.

Shapes: O rows, I columns, G groups of I / G columns, W = ceil(I / 64) words of a row's mask, K values that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sqft.core.mask import conforms, pack_mask, unpack_mask

WORD = 64
MOST = 2**31 - 1
"""Values that offsets can count."""
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
PATTERNS = len(_PAIRS)


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
        patterns_OP: uint8 [O, 3 · ceil(I / 32)], three bits a four, in little-endian order along the row.
        values_OV: the two values of each four: integers [O, I / 2], or bytes [O, I / 4] of two 4-bit codes.
    """

    patterns_OP: torch.Tensor
    values_OV: torch.Tensor


def to_bitmask(values_OI: torch.Tensor, kept_OI: torch.Tensor, *, group: int | None = None) -> Bitmask:
    """Return a matrix in the bitmask layout.

    Args:
        values_OI: integers (of a float its bits).
        kept_OI: bool; what is not kept is not stored.
        group: columns of a group, for 4-bit codes of which two share a byte; None keeps whole integers.
    """
    mask_OW = _words(kept_OI)
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


def row_values(packed: Bitmask, columns: int, *, group: int | None = None) -> torch.Tensor:
    """Return how many entries of `values_K` each row has by its mask, int64 [O]."""
    kept_OI = packed.kept(columns)
    if group is None:
        counts: torch.Tensor = kept_OI.sum(dim=1)
    else:
        counts = ((kept_OI.unflatten(1, (-1, group)).sum(dim=2) + 1) // 2).sum(dim=1)
    return counts


def to_two_of_four(values_OI: torch.Tensor, kept_OI: torch.Tensor, *, nibbles: bool = False) -> TwoOfFour:
    """Return a matrix in the 2:4 layout; of fours with fewer non-zeros, zeros are stored as values.

    Args:
        values_OI: integers [O, I], I divisible by 4.
        kept_OI: bool, at most two of each four.
        nibbles: the values are 4-bit codes; the two of a four share a byte.

    Raises:
        ValueError: a four keeps more than two.
    """
    if not conforms(kept_OI, 2, 4):
        raise ValueError("a group of four keeps more than two weights")
    fours = kept_OI.unflatten(1, (-1, 4)).to(torch.uint8)
    sets = fours[..., 0] | fours[..., 1] << 1 | fours[..., 2] << 2 | fours[..., 3] << 3
    pattern_OF = _pattern_of_set()[sets.int()]
    chosen = torch.tensor(_PAIRS)[pattern_OF.int()]  # [O, F, 2]
    values_OF2 = values_OI.unflatten(1, (-1, 4)).gather(2, chosen)
    values_OV = values_OF2[..., 0] | values_OF2[..., 1] << 4 if nibbles else values_OF2.flatten(1)
    return TwoOfFour(_pack_patterns(pattern_OF), values_OV.contiguous())


def from_two_of_four(packed: TwoOfFour, zeros_OI: torch.Tensor, *, nibbles: bool = False) -> torch.Tensor:
    """Undo :func:`to_two_of_four`; `zeros_OI` is written into and returned."""
    fours = zeros_OI.unflatten(1, (-1, 4))
    pattern_OF = patterns(packed.patterns_OP, fours.shape[1])
    if nibbles:
        values_OF2 = torch.stack([packed.values_OV & 15, packed.values_OV >> 4], dim=-1)
    else:
        values_OF2 = packed.values_OV.unflatten(1, (-1, 2))
    fours.scatter_(2, torch.tensor(_PAIRS)[pattern_OF.int()], values_OF2)
    return zeros_OI


def kept_of_patterns(patterns_OP: torch.Tensor, columns: int) -> torch.Tensor:
    """Return which two of each four are stored, bool [O, I]."""
    fours = patterns(patterns_OP, columns // 4)
    kept = torch.zeros(*fours.shape, 4, dtype=torch.bool)
    return kept.scatter_(2, torch.tensor(_PAIRS)[fours], torch.ones_like(kept[..., :2])).flatten(1)


def _words(kept_OI: torch.Tensor) -> torch.Tensor:
    """Return a mask as int64 words [O, W]."""
    padded = torch.nn.functional.pad(kept_OI, (0, -kept_OI.shape[1] % WORD))
    return pack_mask(padded.contiguous()).view(torch.int64)


def _nibble_places(kept_OGS: torch.Tensor, starts_N: torch.Tensor) -> torch.Tensor:
    """Return, for each kept weight [O, I], the number of its half byte: its group's first one and those before it."""
    before = kept_OGS.to(torch.int32).cumsum(dim=2, dtype=torch.int32) - 1
    return (2 * starts_N.view(*kept_OGS.shape[:2], 1) + before).flatten(1)


def _pairs_to_bytes(nibbles: torch.Tensor) -> torch.Tensor:
    return nibbles[0::2] | nibbles[1::2] << 4


def _bytes_to_pairs(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()


def _pattern_of_set() -> torch.Tensor:
    """Return uint8 [16]: the first pair that holds a set of kept places, given as bits."""
    table = torch.zeros(16, dtype=torch.uint8)
    for places in range(16):
        holding = [i for i, pair in enumerate(_PAIRS) if all(k in pair for k in range(4) if places >> k & 1)]
        table[places] = holding[0] if holding else 0
    return table


def _pack_patterns(pattern_OF: torch.Tensor) -> torch.Tensor:
    """Return three-bit numbers [O, F] as bytes [O, 3 · ceil(F / 8)]: eight of them are 24 bits."""
    padded = torch.nn.functional.pad(pattern_OF, (0, -pattern_OF.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.int32)
    words = (padded << torch.arange(0, 24, 3, dtype=torch.int32)).sum(dim=2, dtype=torch.int32)
    return torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=2).to(torch.uint8).flatten(1)


def patterns(patterns_OP: torch.Tensor, fours: int) -> torch.Tensor:
    """Return the number of each four's pattern, int32 [O, fours], from their packed bytes."""
    parts = patterns_OP.unflatten(1, (-1, 3)).to(torch.int32)
    words = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    found: torch.Tensor = words.unsqueeze(2) >> torch.arange(0, 24, 3, dtype=torch.int32) & 7
    return found.flatten(1)[:, :fours]
