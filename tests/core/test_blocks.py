"""GGUF blocks against gguf-py's own dequantisation: every scale and zero point, to the bit, and what no block holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from sqft.core.blocks import TYPES, encode, exact_types
from sqft.core.grid import Grid
from sqft.errors import InputError

EXPONENTS = range(-17, 13)


def every(mantissa_bits: int, bits: int, zeros: range, dtype: torch.dtype) -> tuple[torch.Tensor, Grid]:
    """Return a weight with a group of 32 for every mantissa, exponent and zero point, whose codes are all there are."""
    mantissas = torch.arange(2 ** (mantissa_bits - 1), 2**mantissa_bits, dtype=torch.float64) * 2.0 ** (
        1 - mantissa_bits
    )
    rows = torch.cartesian_prod(mantissas, torch.tensor(list(zeros), dtype=torch.float64))
    scale = rows[:, :1] * torch.tensor([2.0**e for e in EXPONENTS], dtype=torch.float64)
    zero = rows[:, 1:].expand_as(scale).to(torch.uint8)
    grid = Grid(scale.to(dtype), zero.contiguous(), bits, 32 * len(EXPONENTS), False)
    assert torch.equal(grid.scale_OG.double(), scale)
    codes = torch.arange(32 * len(EXPONENTS)).remainder(2**bits).to(torch.uint8).expand(len(rows), -1).contiguous()
    return codes, grid


def same_bits(codes: torch.Tensor, grid: Grid, name: str) -> bool:
    read = dequantize(encode(codes, grid, name).numpy(), GGMLQuantizationType[name])
    return np.array_equal(read.view(np.uint32), grid.dequantize(codes).numpy().view(np.uint32))


def test_sizes_are_those_of_gguf() -> None:
    assert {name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in TYPES} == {
        name: (32, kind.size) for name, kind in TYPES.items()
    }
    assert [kind.bits for kind in TYPES.values()] == [4.5, 5.0, 5.5, 8.5]


def test_every_scale_of_eight_bits_and_every_zero_point_is_exact_in_q4_1() -> None:
    codes, grid = every(8, 4, range(16), torch.bfloat16)
    assert exact_types(codes, grid) == ["Q4_1", "Q5_0", "Q8_0"]
    for name in ("Q4_1", "Q5_0", "Q8_0"):
        assert same_bits(codes, grid, name)


@pytest.mark.parametrize(("bits", "zeros"), [(2, range(4)), (3, range(8)), (4, range(8, 9))])
def test_narrow_and_symmetric_grids_are_exact_in_q4_0(bits: int, zeros: range) -> None:
    codes, grid = every(8, bits, zeros, torch.bfloat16)
    assert exact_types(codes, grid)[0] == "Q4_0"
    for name in TYPES:
        assert same_bits(codes, grid, name)


def test_scales_of_eleven_bits_need_q5_0() -> None:
    codes, grid = every(11, 4, range(1, 16), torch.float32)
    usable = slice(3, None)  # float16 has 11 bits from 2⁻¹⁴ up
    grid = Grid(grid.scale_OG[:, usable], grid.zero_OG[:, usable], 4, grid.columns - 96, False)
    codes = codes[:, 96:]
    assert exact_types(codes, grid) == ["Q5_0", "Q8_0"]
    assert same_bits(codes, grid, "Q5_0")
    assert not same_bits(codes, grid, "Q4_1")  # the comparison can fail


def test_eight_bits_fit_where_zero_is_the_middle() -> None:
    codes, grid = every(8, 8, range(128, 129), torch.bfloat16)
    codes = torch.arange(codes.numel()).remainder(256).to(torch.uint8).view_as(codes)
    assert exact_types(codes, grid) == ["Q8_0"]
    assert same_bits(codes, grid, "Q8_0")
    beside = Grid(grid.scale_OG, grid.zero_OG - 1, 8, grid.columns, False)
    with pytest.raises(
        InputError, match=r"8 bits lie -127 to 128 steps from zero.*Q8_0, holds -128 to 127; .*symmetric: true"
    ):
        exact_types(codes, beside)


@pytest.mark.parametrize("group", [32, 64, 192])
def test_groups_of_several_blocks(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    weight = torch.randn(24, 384, generator=generator)
    grid = Grid.fit(weight, bits=4, group_size=group, symmetric=False, dtype=torch.bfloat16)
    codes = grid.quantize(weight)
    assert exact_types(codes, grid)[0] == "Q4_1"
    for name in ("Q4_1", "Q5_0"):
        assert same_bits(codes, grid, name)


def test_a_pruned_weight_stays_plus_zero() -> None:
    grid = Grid(
        torch.full((16, 1), 0.037, dtype=torch.bfloat16), torch.arange(16, dtype=torch.uint8)[:, None], 4, 32, False
    )
    assert same_bits(grid.zero_codes(), grid, "Q4_1")


@pytest.mark.parametrize(
    ("scale", "group", "said"),
    [
        (torch.tensor(0.1, dtype=torch.bfloat16), 16, "groups of 16 weights share a scale.*multiple of 32"),
        (torch.tensor(0.1), 32, "2 of 2 scales, stored as float32, are no float16 numbers.*bfloat16.*format gptq"),
        (
            torch.tensor(1e-9, dtype=torch.bfloat16),
            32,
            "2 of 2 scales, stored as bfloat16, .*quantise with format gptq",
        ),
        (torch.tensor(1e9, dtype=torch.bfloat16), 32, "are no float16 numbers"),
    ],
)
def test_a_grid_that_no_block_holds_is_refused_with_the_setting_that_fits(
    scale: torch.Tensor, group: int, said: str
) -> None:
    shape = (1, 64 // group)
    grid = Grid(scale.expand(shape), torch.full(shape, 8, dtype=torch.uint8), 4, 64, True)
    with pytest.raises(InputError, match=said):
        exact_types(torch.zeros(1, 64, dtype=torch.uint8), grid)


def test_every_reason_is_given_at_once() -> None:
    grid = Grid(torch.full((1, 4), 0.1), torch.full((1, 4), 3, dtype=torch.uint8), 8, 64, False)
    with pytest.raises(InputError) as stop:
        exact_types(torch.full((1, 64), 255, dtype=torch.uint8), grid)
    assert all(word in str(stop.value) for word in ("3 problems", "group_size", "float16", "symmetric: true"))
