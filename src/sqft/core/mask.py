"""Masks: which weights are kept, chosen from a score, and stored as one bit a weight.

Shapes: O out features, I in features, M the group of an N:M pattern. A mask is a bool tensor, True = kept.
Selection is exact: every output row (or group of M) loses the same count, ties go to the lower index first, which is
what the reference's stable sort does. Packing is little-endian along the last dimension, padded to whole bytes.
"""

from __future__ import annotations

from functools import cache

import torch

from sqft.errors import InputError, NumericalError

_PART = 1 << 22  # scores ranked at a time
_GATHER = 0x0102040810204080


def finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or Inf: as torch.isfinite would, but with no temporaries of the tensor's size."""
    if tensor.numel() == 0:
        return True
    # A NaN anywhere makes both extremes NaN.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def mask_from_score(score_OI: torch.Tensor, sparsity: float, structure: tuple[int, int] | None = None) -> torch.Tensor:
    """Keep the highest-scoring weights of each output row, or of each group of an N:M pattern.

    Prunes the `int(I * sparsity)` lowest entries of every row, as Wanda does (Sun et al. 2023, section 3).

    Args:
        score_OI: importance, shape [O, I], any float dtype, finite.
        sparsity: fraction pruned in each row; not used with a `structure`.
        structure: (keep_n, group_m) or None for unstructured.

    Returns:
        bool mask [O, I], True = kept.

    Raises:
        NumericalError: a score is NaN or infinite.
        InputError: group_m does not divide I.
    """
    if not finite(score_OI):
        raise NumericalError("the pruning score has NaN or Inf; the weights or the calibration activations have too")
    if structure is None:
        count = int(score_OI.shape[-1] * sparsity)
        # Rows are independent; in parts, the indices that kthvalue makes beside its values stay small.
        step = max(1, _PART // score_OI.shape[-1])
        return torch.cat([~_lowest(part, count) for part in score_OI.split(step)])
    keep_n, group_m = structure
    rows, columns = score_OI.shape
    if columns % group_m:
        raise InputError(f"pattern {keep_n}:{group_m} does not divide rows of {columns} weights")
    grouped = score_OI.reshape(rows * columns // group_m, group_m)
    return ~_lowest(grouped, group_m - keep_n).reshape(rows, columns)


def keep_highest(score_MO: torch.Tensor, keep_n: int) -> torch.Tensor:
    """Keep the highest `keep_n` of M along the first dimension, bool [M, O]; among equals the last ones.

    What :func:`mask_from_score` keeps of a group, by comparing all pairs at once: few operations where M is small.
    """
    group_m = len(score_MO)
    not_above = torch.empty(group_m, *score_MO.shape, device=score_MO.device)
    torch.le(score_MO.unsqueeze(1), score_MO.unsqueeze(0), out=not_above)
    counts, first = _pair_counts(group_m)
    above_MO = counts.to(score_MO.device) @ not_above.flatten(0, 1)
    return above_MO >= (group_m - keep_n - first.to(score_MO.device))


@cache
def _pair_counts(group_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (counts [M, M · M], first [M, 1]): of how many others each is above, from "i is not above k" of all pairs.

    Of a pair i < k, k is above where i is not, and i is above otherwise; so a tie goes to the later one.
    """
    counts = torch.zeros(group_m, group_m, group_m)
    for i in range(group_m):
        for k in range(i + 1, group_m):
            counts[k, i, k], counts[i, i, k] = 1, -1
    return counts.flatten(1), torch.arange(group_m - 1, -1, -1.0).unsqueeze(1)


def _lowest(score_RC: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest entries of each row; among equals the first ones.

    kthvalue is linear in the row where a stable sort is not: 4 to 10 times faster at Llama shapes.
    """
    if count <= 0:
        return torch.zeros_like(score_RC, dtype=torch.bool)
    threshold = score_RC.kthvalue(count, dim=-1, keepdim=True).values
    below = score_RC < threshold
    tied = score_RC == threshold
    room = count - below.sum(dim=-1, keepdim=True)
    if bool((tied.sum(dim=-1, keepdim=True) == room).all()):
        return below | tied
    return below | (tied & (tied.cumsum(dim=-1) <= room))


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool mask [..., I] into uint8 [..., ceil(I / 8)], bit i of byte j being column 8 j + i."""
    bits = mask.view(torch.uint8)
    # Whole words: eight bytes of a 0 or a 1 each, of which a product moves bit 8 k to bit 56 + k.
    padded = torch.nn.functional.pad(bits, (0, -mask.shape[-1] % 8))
    if not padded.is_contiguous() or padded.storage_offset() % 8:
        padded = padded.clone(memory_format=torch.contiguous_format)
    return (padded.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_mask(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo :func:`pack_mask`.

    Args:
        packed: uint8 [..., ceil(columns / 8)].
        columns: I.

    Returns:
        bool mask [..., I].
    """
    bits = _bytes_of_bits().to(packed.device).index_select(0, packed.flatten().to(torch.int32))
    return bits.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :columns]


@cache
def _bytes_of_bits() -> torch.Tensor:
    """Return int64 [256]: of a byte its bits, a byte each."""
    bits = torch.arange(256, dtype=torch.int64).unsqueeze(1) >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()


def conforms(kept: torch.Tensor, keep_n: int, group_m: int) -> bool:
    """Return whether every group of `group_m` along the last dimension keeps at most `keep_n`.

    Args:
        kept: bool [..., I].
        keep_n: N.
        group_m: M.
    """
    if kept.shape[-1] % group_m:
        return False
    return bool((kept.unflatten(-1, (-1, group_m)).sum(dim=-1) <= keep_n).all())
