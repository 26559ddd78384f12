"""GPTQ under a mask against a column-by-column loop in double precision; grids against hand-computed numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from sqft.core import gptq as gptq_module
from sqft.core.gptq import Quantized, gptq, round_to_nearest
from sqft.core.grid import Grid, QuantizedWeight, pack_codes, stretches, unpack_codes
from sqft.errors import InputError, NumericalError


def problem(rows: int = 24, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * 0.2
    x = torch.randn(400, columns, generator=generator) @ mixing + 0.1 * torch.randn(400, columns, generator=generator)
    return weight, x.T @ x, torch.rand(rows, columns, generator=generator) < 0.5


def naive(
    weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, bits: int, group: int, symmetric: bool, act: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frantar et al. 2022, algorithm 1, one column at a time, everything updated at once, in double precision."""
    weight = (weight * mask).double()
    columns = weight.shape[1]
    first = Grid.fit(weight.float(), bits=bits, group_size=group, symmetric=symmetric, dtype=torch.bfloat16)
    scale, zero = first.scale_OG.double().clone(), first.zero_OG.double().clone()
    order = hessian.diagonal().argsort(descending=True, stable=True) if act else torch.arange(columns)
    permuted = hessian[order][:, order].double()
    permuted += 0.01 * permuted.diagonal().mean() * torch.eye(columns, dtype=torch.double)
    factor = torch.linalg.cholesky(torch.linalg.inv(permuted), upper=True)
    work, codes = weight[:, order].clone(), torch.zeros_like(weight)
    for j in range(columns):
        column = int(order[j])
        g = column // group
        if not act and column % group == 0:
            part = slice(j, j + group)
            fit = Grid.fit(
                (work[:, part] * mask[:, part]).float(), bits=bits, group_size=None, symmetric=symmetric,
                dtype=torch.bfloat16,
            )  # fmt: skip
            scale[:, g], zero[:, g] = fit.scale_OG[:, 0].double(), fit.zero_OG[:, 0].double()
        q = ((work[:, j] / scale[:, g]).round() + zero[:, g]).clamp(0, 2**bits - 1)
        q = torch.where(mask[:, column], q, zero[:, g])
        codes[:, column] = q
        error = (work[:, j] - scale[:, g] * (q - zero[:, g])) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes, scale, zero


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_the_naive_loop_and_keeps_every_zero(bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    weight, hessian, mask = problem()
    found = gptq(
        weight, hessian, mask, bits=bits, group_size=group, symmetric=symmetric, dtype=torch.bfloat16,
        act_order=act_order,
    )  # fmt: skip
    codes, scale, zero = naive(weight, hessian, mask, bits, group, symmetric, act_order)
    assert (found.codes_OI == codes).float().mean() > 0.998  # float32 against double: a tie may fall either way
    assert torch.equal(found.grid.scale_OG.double(), scale)
    assert torch.equal(found.grid.zero_OG.double(), zero)
    assert torch.equal(found.codes_OI[~mask], found.grid.zero_codes()[~mask])
    assert not found.offset_OI[~mask].any()


def loss(result: Quantized, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = result.grid.dequantize(result.codes_OI) - weight
    return float((difference @ hessian * difference).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding(bits: int) -> None:
    weight, hessian, mask = problem()
    settings = {"bits": bits, "group_size": 32, "symmetric": False, "dtype": torch.bfloat16}
    ours = gptq(weight, hessian, mask, **settings)
    rounded = round_to_nearest(weight * mask, **settings)
    assert torch.equal(rounded.codes_OI[~mask], rounded.grid.zero_codes()[~mask])
    assert loss(ours, weight * mask, hessian) < 0.95 * loss(rounded, weight * mask, hessian)


def test_rows_are_independent_so_a_tall_weight_is_its_parts() -> None:
    weight, hessian, mask = problem()
    settings = {"bits": 4, "group_size": 32, "symmetric": False, "dtype": torch.bfloat16}
    tall = gptq(weight, hessian, mask, **settings).split([8, 16])
    alone = gptq(weight[8:], hessian, mask[8:], **settings)
    assert torch.equal(tall[1].codes_OI, alone.codes_OI)
    assert torch.equal(tall[1].offset_OI, alone.offset_OI)


@pytest.mark.parametrize("act_order", [True, False])
def test_stretches_of_rows_are_the_whole(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, mask = problem()
    settings: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "dtype": torch.bfloat16}
    whole = gptq(weight, hessian, mask, act_order=act_order, **settings), round_to_nearest(weight, **settings)
    short = partial(stretches, most=7 * weight.shape[1])  # three stretches of 7 rows, and one of 3
    assert [part.stop - part.start for part in short(weight)] == [7, 7, 7, 3]
    monkeypatch.setattr(gptq_module, "stretches", short)
    parts = gptq(weight, hessian, mask, act_order=act_order, **settings), round_to_nearest(weight, **settings)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.codes_OI, other.codes_OI)
        assert torch.equal(one.offset_OI, other.offset_OI)
        assert torch.equal(one.grid.scale_OG, other.grid.scale_OG)
        assert torch.equal(one.grid.zero_OG, other.grid.zero_OG)


def test_a_hessian_that_cannot_be_factored_is_an_error_with_the_remedy() -> None:
    weight, hessian, mask = problem()
    settings = {"bits": 4, "group_size": 32, "symmetric": False, "dtype": torch.bfloat16}
    with pytest.raises(NumericalError, match="not positive definite with damping 1e-12; use more calibration"):
        gptq(weight, hessian - 2 * torch.diag(hessian.diagonal()), mask, damping=1e-12, **settings)
    broken = hessian.clone()
    broken[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        gptq(weight, broken, mask, **settings)
    with pytest.raises(InputError, match="group size 36 does not divide rows of 96"):
        gptq(weight, hessian, mask, **{**settings, "group_size": 36})


def test_a_grid_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0, 0.0, 0.0, 0.0, 0.0]])
    grid = Grid.fit(weight, bits=2, group_size=4, symmetric=False, dtype=torch.float32)
    assert grid.scale_OG.tolist() == [[1.0, 1.0]]  # (2 − −1) / 3; the empty group gets 1
    assert grid.zero_OG.tolist() == [[1, 2]]
    codes = grid.quantize(weight)
    assert codes.tolist() == [[0, 1, 1, 3, 2, 2, 2, 2]]  # 0.5 rounds to even
    assert grid.dequantize(codes).tolist() == [[-1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantising_is_what_compressed_tensors_does_with_the_same_grid(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    grid = Grid.fit(weight, bits=bits, group_size=16, symmetric=symmetric, dtype=dtype)
    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=16)
    theirs = fake_quantize(
        weight.float(),
        grid.scale_OG.float(),
        (grid.zero_OG.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8),
        arguments,
    )
    # It adds the zero point before it rounds, so a weight half-way between two codes may fall to the other one.
    steps = weight.float() / grid.scale_OG.float().repeat_interleave(16, dim=1)
    tie = (steps - steps.floor()) == 0.5
    ours = grid.dequantize(grid.quantize(weight))
    assert torch.equal(ours[~tie], theirs[~tie])
    assert tie.float().mean() < 0.1  # the largest weight of a symmetric group is one


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [8, 13])
def test_codes_pack_and_unpack(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() * 8 <= 5 * (columns + 7) * {2: 2, 3: 4, 4: 4, 8: 8}[bits]
    assert torch.equal(unpack_codes(packed, bits, columns).to(torch.uint8), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_code_and_offset_round_to_the_code_by_construction(bits: int) -> None:
    weight, hessian, mask = problem()
    found = gptq(weight, hessian, mask, bits=bits, group_size=32, symmetric=False, dtype=torch.bfloat16)
    packed = QuantizedWeight(pack_codes(found.codes_OI, bits), found.grid, torch.bfloat16, found.offset_OI)
    steps = packed.start_steps(slice(0, 24)).flatten(1)
    centre = found.codes_OI.float() - found.grid.zero_codes().float()
    assert torch.equal(steps.round(), centre)
    assert (steps - centre).abs().max() <= 127 / 256
    assert (steps != centre).any()
