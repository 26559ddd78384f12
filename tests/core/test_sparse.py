"""Sparse layouts against naive loops, and back."""

from __future__ import annotations

import pytest
import torch

from sqft.core.mask import unpack_mask
from sqft.core.sparse import (
    Bitmask,
    Integers,
    are_patterns,
    as_bitmask,
    at_most_two_of_four,
    compress,
    expand,
    expands_to,
    from_bitmask,
    kept_of_patterns,
    kept_values,
    mask_bytes,
    mask_words,
    nonzeros,
    row_ends,
    to_bitmask,
    to_two_of_four,
    words_of_bytes,
)
from sqft.kernels import build
from sqft.kernels import sparse as kernel


@pytest.fixture(params=["kernel", "PyTorch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with the compiled kernel and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(kernel, "KERNEL", build.Kernel(lambda: "switched off", "said"))
    elif kernel.KERNEL.absence() is not None:
        pytest.skip(str(kernel.KERNEL.absence()))
    name: str = request.param
    return name


def draw(shape: tuple[int, int], share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int16 values, and which are kept."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < share
    return torch.randint(1, 2**15, shape, generator=generator).to(torch.int16) * kept, kept


@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_bitmask_holds_bits_and_values_in_order(columns: int, share: float) -> None:
    values, kept = draw((5, columns), share)
    kind, rows = Integers(16, columns), values.view(torch.uint8)
    assert torch.equal(nonzeros(rows, kind), mask_words(values != 0))
    packed = compress(rows, kind, mask_words(kept))
    ordered = [int(v) for row, keep in zip(values, kept, strict=True) for v, k in zip(row, keep, strict=True) if k]
    assert packed.values_K.tolist() == ordered
    for row in range(5):
        words = [int(word) & (2**64 - 1) for word in packed.mask_OW[row]]
        bits = [words[i // 64] >> (i % 64) & 1 for i in range(64 * len(words))]
        assert bits[:columns] == kept[row].int().tolist()
        assert not any(bits[columns:])
        assert int(packed.offsets_O[row]) == int(kept[: row + 1].sum())
    assert same(packed, to_bitmask(values, kept))
    assert torch.equal(from_bitmask(packed, torch.zeros_like(values)), values)
    assert torch.equal(expand(packed, kind), rows)
    assert expands_to(packed, kind, rows)
    for place in {0, rows.shape[1] // 2, rows.shape[1] - 1}:
        other = rows.clone()
        other[-1, place] ^= 16
        assert not expands_to(packed, kind, other)
    assert row_ends(packed.mask_OW, columns).tolist() == packed.offsets_O.tolist()
    assert kept_values(packed.mask_OW) == int(kept.sum())


@pytest.mark.parametrize(("columns", "group"), [(64, 32), (128, 64), (192, 48), (96, 96), (40, 8), (12, 6), (384, 128)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_half_bytes_of_a_group_begin_at_a_byte(columns: int, group: int, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (6, columns), generator=generator, dtype=torch.uint8)
    kept = torch.rand(codes.shape, generator=generator) < share
    zero_OG = torch.randint(0, 16, (6, columns // group), generator=generator, dtype=torch.uint8)
    zeros = zero_OG.repeat_interleave(group, dim=1)
    codes = torch.where(kept, codes, zeros)
    kind = Integers(4, columns, group, zero_OG)
    rows = kind.join(codes)
    assert torch.equal(kind.split(rows), codes)
    assert torch.equal(nonzeros(rows, kind), mask_words(codes != zeros))
    packed = compress(rows, kind, mask_words(kept))
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
    assert same(packed, to_bitmask(codes, kept, group=group))
    assert row_ends(packed.mask_OW, columns, group=group).tolist() == ends
    assert torch.equal(from_bitmask(packed, zeros.clone(), group=group), codes)
    assert torch.equal(expand(packed, kind), rows)
    assert expands_to(packed, kind, rows)
    for place in {0, rows.shape[1] // 2, rows.shape[1] - 1}:
        other = rows.clone()
        other[-1, place] ^= 16
        assert not expands_to(packed, kind, other)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("columns", "group"), [(64, None), (65, None), (128, 16), (100, 64)])
def test_bytes_and_words_with_zeros_of_their_own(bits: int, columns: int, group: int | None) -> None:
    dtype = {8: torch.uint8, 32: torch.int32}[bits]
    generator = torch.Generator().manual_seed(3)
    zero_OG = None
    if group is not None and bits == 8:
        zero_OG = torch.randint(0, 256, (4, -(-columns // group)), generator=generator, dtype=torch.uint8)
    kind = Integers(bits, columns, group if bits == 8 else None, zero_OG)
    kept = torch.rand((4, columns), generator=generator) < 0.4
    values = torch.randint(1, 250, kept.shape, generator=generator).to(dtype)
    values = torch.where(kept, values, kind.zeros(4))
    rows = kind.join(values)
    found = nonzeros(rows, kind)
    assert torch.equal(found, mask_words(values != kind.zeros(4)))
    packed = compress(rows, kind, mask_words(kept))
    assert packed.values_K.tolist() == values[kept].tolist()
    assert torch.equal(expand(packed, kind), rows)
    assert expands_to(packed, kind, rows)
    for place in {0, rows.shape[1] // 2, rows.shape[1] - 1}:
        other = rows.clone()
        other[-1, place] ^= 16
        assert not expands_to(packed, kind, other)


def test_a_zero_point_that_no_code_is_keeps_all() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 4)
    kind = Integers(4, 64, 32, torch.tensor([[16, 3], [0, 16]], dtype=torch.uint8))
    kept = nonzeros(kind.join(codes), kind)
    assert row_ends(kept, 64).tolist() == [62, 124]
    assert torch.equal(expand(compress(kind.join(codes), kind, kept), kind), kind.join(codes))


@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 200])
def test_words_hold_a_stored_mask(columns: int) -> None:
    kept = draw((3, columns), 0.5)[1]
    stored = mask_bytes(mask_words(kept), columns)
    assert torch.equal(unpack_mask(stored, columns), kept)
    assert torch.equal(words_of_bytes(stored, columns), mask_words(kept))
    if columns % 8:
        stored[:, -1] |= 128  # what lies behind the columns is nobody's
        assert torch.equal(words_of_bytes(stored, columns), mask_words(kept))


def test_values_that_are_missing_are_not_read(path: str) -> None:
    if path == "PyTorch":
        pytest.skip("masked writing refuses them")
    values, kept = draw((2, 64), 1.0)
    packed = compress(values.view(torch.uint8), Integers(16, 64), mask_words(kept))
    short = Bitmask(packed.mask_OW, packed.values_K[:70].clone(), packed.offsets_O)
    found = expand(short, Integers(16, 64)).view(torch.int16).flatten()
    assert torch.equal(found[:70], values.flatten()[:70])
    assert not found[70:].any()


@pytest.mark.parametrize("columns", [4, 28, 32, 100])
@pytest.mark.parametrize("nibbles", [False, True])
def test_two_of_four(columns: int, nibbles: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    fours = torch.rand((7, columns // 4, 4), generator=generator)
    kept = (fours >= fours.sort(dim=2).values[..., 2:3]) & (fours > 0.2)  # two of four, some fewer
    kept = kept.flatten(1)
    values = torch.randint(1, 16, kept.shape, generator=generator, dtype=torch.uint8)
    values = torch.where(kept, values, 0)
    bits = 4 if nibbles and columns % 8 == 0 else 8
    kind = Integers(bits, columns, columns if bits == 4 else None)
    rows = kind.join(values)
    packed = to_two_of_four(rows, kind, mask_words(kept))
    assert packed.patterns_OP.shape == (7, -(-columns // 32) * 3)
    assert are_patterns(packed.patterns_OP)
    assert packed.values_K.shape == (7 * columns // (4 if bits == 4 else 2),)
    made = as_bitmask(packed, columns, halves=bits == 4)
    assert made.offsets_O[-1] == len(made.values_K)
    assert torch.equal(expand(made, kind, in_order=True), rows)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    stored = unpack_mask(kept_of_patterns(packed.patterns_OP, columns).view(torch.uint8), columns)
    for row in range(7):
        number = int.from_bytes(bytes(packed.patterns_OP[row].tolist()), "little")
        for four in range(columns // 4):
            places = {i for i in range(4) if kept[row, 4 * four + i]}
            pair = pairs[number >> (3 * four) & 7]
            assert places <= set(pair)
            assert {i for i in range(4) if stored[row, 4 * four + i]} == set(pair)


def test_half_bytes_of_a_four_share_a_byte_in_whatever_groups() -> None:
    kept = torch.tensor([[True, False, True, False, False, False, False, True] * 3])
    codes = torch.arange(1, 25, dtype=torch.uint8).remainder(16).view(1, 24) * kept
    kind = Integers(4, 24, 6, torch.zeros(1, 4, dtype=torch.uint8))
    packed = to_two_of_four(kind.join(codes), kind, mask_words(kept))
    assert len(packed.values_K) == 6
    assert torch.equal(expand(as_bitmask(packed, 24, halves=True), kind, in_order=True), kind.join(codes))


def test_three_of_four_are_refused() -> None:
    kept = mask_words(torch.tensor([[True, True, True, False]]))
    assert not at_most_two_of_four(kept)
    assert not at_most_two_of_four(mask_words(torch.ones(1, 4, dtype=torch.bool)))
    assert at_most_two_of_four(mask_words(torch.tensor([[True, False, True, False, False, True, True, False]])))
    with pytest.raises(ValueError, match="more than two"):
        to_two_of_four(torch.ones(1, 4, dtype=torch.uint8), Integers(8, 4), kept)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("number", range(8))
def test_patterns_beyond_the_six_are_seen(place: int, number: int) -> None:
    stored = torch.zeros(2, 6, dtype=torch.uint8)
    stored[1, 3:] = torch.tensor(list((number << 3 * place).to_bytes(3, "little")), dtype=torch.uint8)
    assert are_patterns(stored) is (number < 6)


def same(one: Bitmask, other: Bitmask) -> bool:
    """Return whether two bitmasks are equal."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("mask_OW", "values_K", "offsets_O"))
