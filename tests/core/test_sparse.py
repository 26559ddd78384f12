"""Sparse layouts against naive loops, and back."""

from __future__ import annotations

import pytest
import torch

from sqft.core.sparse import (
    from_bitmask,
    from_two_of_four,
    patterns,
    row_values,
    to_bitmask,
    to_two_of_four,
)


def draw(shape: tuple[int, int], share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int16 values, and which are kept."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < share
    return torch.randint(1, 2**15, shape, generator=generator).to(torch.int16) * kept, kept


@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_bitmask_holds_bits_and_values_in_order(columns: int, share: float) -> None:
    values, kept = draw((5, columns), share)
    packed = to_bitmask(values, kept)
    ordered = [int(v) for row, keep in zip(values, kept, strict=True) for v, k in zip(row, keep, strict=True) if k]
    assert packed.values_K.tolist() == ordered
    for row in range(5):
        words = [int(word) & (2**64 - 1) for word in packed.mask_OW[row]]
        bits = [words[i // 64] >> (i % 64) & 1 for i in range(64 * len(words))]
        assert bits[:columns] == kept[row].int().tolist()
        assert not any(bits[columns:])
        assert int(packed.offsets_O[row]) == int(kept[: row + 1].sum())
    assert torch.equal(from_bitmask(packed, torch.zeros_like(values)), values)
    assert row_values(packed, columns).tolist() == kept.sum(dim=1).tolist()


@pytest.mark.parametrize(("columns", "group"), [(64, 32), (128, 64), (96, 96), (40, 8)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_half_bytes_of_a_group_begin_at_a_byte(columns: int, group: int, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (6, columns), generator=generator, dtype=torch.uint8)
    kept = torch.rand(codes.shape, generator=generator) < share
    zeros = torch.full_like(codes, 7)
    packed = to_bitmask(codes, kept, group=group)
    expected: list[int] = []
    ends = []
    for row in range(6):
        for start in range(0, columns, group):
            inside = [int(codes[row, i]) for i in range(start, start + group) if kept[row, i]]
            inside += [0] * (len(inside) % 2)
            expected += [low | high << 4 for low, high in zip(inside[0::2], inside[1::2], strict=True)]
        ends.append(len(expected))
    assert packed.values_K.tolist() == expected
    assert packed.offsets_O.tolist() == ends
    assert row_values(packed, columns, group=group).cumsum(0).tolist() == ends
    assert torch.equal(from_bitmask(packed, zeros.clone(), group=group), torch.where(kept, codes, zeros))


@pytest.mark.parametrize("columns", [4, 28, 32, 100])
@pytest.mark.parametrize("nibbles", [False, True])
def test_two_of_four(columns: int, nibbles: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    fours = torch.rand((7, columns // 4, 4), generator=generator)
    kept = (fours >= fours.sort(dim=2).values[..., 2:3]) & (fours > 0.2)  # two of four, some fewer
    kept = kept.flatten(1)
    values = torch.randint(1, 16, kept.shape, generator=generator, dtype=torch.uint8)
    values = torch.where(kept, values, 0)
    packed = to_two_of_four(values, kept, nibbles=nibbles)
    assert packed.patterns_OP.shape == (7, -(-columns // 32) * 3)
    assert packed.values_OV.shape == (7, columns // (4 if nibbles else 2))
    assert torch.equal(from_two_of_four(packed, torch.zeros_like(values), nibbles=nibbles), values)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    found = patterns(packed.patterns_OP, columns // 4)
    for row in range(7):
        number = int.from_bytes(bytes(packed.patterns_OP[row].tolist()), "little")
        for four in range(columns // 4):
            assert int(found[row, four]) == number >> (3 * four) & 7
            places = {i for i in range(4) if kept[row, 4 * four + i]}
            assert places <= set(pairs[int(found[row, four])])


def test_three_of_four_are_refused() -> None:
    kept = torch.tensor([[True, True, True, False]])
    with pytest.raises(ValueError, match="more than two"):
        to_two_of_four(kept.to(torch.uint8), kept)
