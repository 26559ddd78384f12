"""Run by test_weights.py in a process with TRITON_INTERPRET=1: the kernels take tensors on the CPU there."""

import pytest
import torch

from sqft.core import delta, ordered
from sqft.core.delta import MaskedLinear, dequantized, effective_codes, effective_weight
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask, unpack_mask
from sqft.kernels import gradients, weights

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (70, 200), (33, 131), (5, 64)]
SCALING = 0.37


@pytest.fixture(autouse=True)
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def factors(rows: int, columns: int, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32):
    """A[:r] and the view B[:, :r] of an elastic adapter."""
    lora_A = torch.randn(rank + 3, columns, generator=generator).to(dtype)[:rank]
    lora_B = torch.randn(rows, rank + 3, generator=generator).to(dtype)[:, :rank]
    return lora_A, lora_B


def packed_mask(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return pack_mask(torch.rand(rows, columns, generator=generator) > 0.5)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero included."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_w_prime(shape, dtype, masked, generator) -> None:
    rows, columns = shape
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.view(-1)[::3] = -0.0
    lora_A, lora_B = factors(*shape, 5, generator)
    lora_A.view(-1)[::7], lora_B[0] = 0.0, -0.0
    mask = packed_mask(rows, columns, generator) if masked else None
    expected = effective_weight(weight, lora_A, lora_B, SCALING, mask, ordered=True)
    found = weights.effective_weight(weight, lora_A * SCALING, lora_B, mask)
    assert equal(found, expected)
    assert not equal(found, weight) or shape == (1, 1)
    if mask is not None:
        kept = unpack_mask(mask, columns)
        assert equal(found[~kept], weight[~kept]), "a pruned -0 stays -0"


@pytest.mark.parametrize("rank", [1, 2, 7, 32, 128])
def test_w_prime_of_ranks(rank, generator) -> None:
    weight = torch.randn(20, 150, generator=generator).bfloat16()
    lora_A, lora_B = factors(20, 150, rank, generator, torch.bfloat16)
    expected = effective_weight(weight, lora_A, lora_B, SCALING, ordered=True)
    assert equal(weights.effective_weight(weight, lora_A.float() * SCALING, lora_B.float(), None), expected)


def test_w_prime_of_a_transposed_weight(generator) -> None:
    weight = torch.randn(150, 40, generator=generator).half().T
    lora_A, lora_B = factors(40, 150, 3, generator)
    mask = packed_mask(40, 150, generator)
    found = weights.effective_weight(weight, lora_A * SCALING, lora_B, mask)
    assert found.stride() == weight.stride()
    assert equal(found, effective_weight(weight, lora_A, lora_B, SCALING, mask, ordered=True))


def test_a_nan_stays_one(generator) -> None:
    """The largest NaN would overflow to -0 if it were rounded like a number."""
    weight = torch.full((2, 16), 0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    lora_A, lora_B = factors(2, 16, 2, generator)
    lora_A[0, 0] = torch.inf
    assert weights.effective_weight(weight, lora_A, lora_B, None).isnan().all()
    quantized = quantised((2, 16), 4, 16, None, generator)
    lora_A[0, 0] = torch.nan
    found = weights.effective_quantized(quantized, lora_A, lora_B, None)
    assert found[:, 0].isnan().all()
    assert not found[:, 1:].isnan().any()


def quantised(shape, bits, group, start, generator, dtype: torch.dtype = torch.bfloat16, symmetric: bool = False):
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.5)
    grid = Grid.fit(weight, bits=bits, group_size=group, symmetric=symmetric, dtype=dtype)
    codes = grid.quantize(weight)
    begin = {None: None, "offsets": grid.offsets(weight, codes)}.get(start)
    if isinstance(start, torch.dtype):
        begin = (weight * torch.where(torch.rand(shape, generator=generator) > 0.5, 1.0, -1.0)).to(start)
    return QuantizedWeight(pack_codes(codes, bits), grid, dtype, begin)


GRIDS = [
    # shape, bits, group, start, dtype, masked
    ((70, 192), 4, 32, "offsets", torch.bfloat16, True),
    ((70, 192), 3, 64, None, torch.float16, True),
    ((9, 256), 2, 128, torch.float32, torch.float32, True),
    ((33, 131), 4, None, torch.bfloat16, torch.bfloat16, True),
    ((33, 131), 2, None, "offsets", torch.bfloat16, False),
    ((7, 45), 8, 9, torch.float16, torch.bfloat16, True),
    ((33, 131), 3, 131, "offsets", torch.float32, True),
    ((40, 96), 8, 32, "offsets", torch.bfloat16, False),
    ((1, 1), 4, 1, None, torch.bfloat16, False),
]


def bits_of(inside: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The bits of inside as bool [O, I]."""
    rows, width = weight.packed.shape
    planes = unpack_mask(inside, width)
    return planes.reshape(rows, -1)[:, : weight.shape[1]]


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_the_quantised_weight_its_codes_and_where_it_is_inside(case, generator) -> None:
    shape, bits, group, start, dtype, masked = case
    weight = quantised(shape, bits, group, start, generator, dtype)
    lora_A, lora_B = factors(*shape, 3, generator)
    mask = packed_mask(*shape, generator) if masked else None
    inside = torch.empty(shape, dtype=torch.bool)
    expected = effective_weight(weight, lora_A, lora_B, SCALING, mask, inside_OI=inside, ordered=True)
    given = (weight, lora_A * SCALING, lora_B, mask)
    filled = weights.empty_inside(weight)
    assert equal(weights.effective_quantized(*given, filled), expected)
    assert equal(weights.effective_quantized(*given), expected)
    assert torch.equal(bits_of(filled, weight), inside)
    assert shape == (1, 1) or 0 < int(inside.sum()) < inside.numel()
    assert not (
        expected.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        == torch.iinfo(torch.int16 if dtype.itemsize == 2 else torch.int32).min
    ).any(), "there is a -0"
    codes = weights.effective_codes(*given)
    assert torch.equal(codes, effective_codes(weight, lora_A, lora_B, SCALING, mask, ordered=True))
    assert equal(weights.dequantized(weight), dequantized(weight))
    assert equal(weights.dequantized(QuantizedWeight(pack_codes(codes, bits), weight.grid, dtype)), expected)


@pytest.mark.parametrize("case", [*GRIDS[:6], ((200, 700), 4, 28, None, torch.float32, True)], ids=str)
def test_the_gradients_of_a_and_b(case, generator, monkeypatch) -> None:
    """By float64, and with the sides shared out or not."""
    shape, bits, group, _, dtype, masked = case
    weight = quantised(shape, bits, group, None, generator, dtype)
    lora_A, lora_B = factors(*shape, 3, generator)
    mask = packed_mask(*shape, generator) if masked else None
    inside, filled = torch.empty(shape, dtype=torch.bool), weights.empty_inside(weight)
    effective_weight(weight, lora_A, lora_B, SCALING, mask, inside_OI=inside, ordered=True)
    weights.effective_quantized(weight, lora_A * SCALING, lora_B, mask, filled)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    before = gradient.clone()
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else unpack_mask(mask, shape[1])
    wide_A, wide_B = (factor.to(dtype).double() for factor in (lora_A, lora_B))
    for programs in (1, 512):
        monkeypatch.setattr(gradients, "_PROGRAMS", programs)
        for bits_, where in ((None, kept), (filled, kept & inside)):
            grad_A, grad_B = gradients.adapter_gradients(gradient, lora_A, lora_B, SCALING, mask, bits_)
            wide = gradient.double() * where
            assert grad_A.dtype == grad_B.dtype == torch.float32
            assert torch.allclose(grad_A.double(), SCALING * wide_B.T @ wide, atol=1e-4, rtol=1e-5)
            assert torch.allclose(grad_B.double(), SCALING * wide @ wide_A.T, atol=1e-4, rtol=1e-5)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("quantized", [False, True])
def test_training_by_the_kernels_gives_the_outputs_and_gradients_of_the_ordered_path(
    quantized: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (70, 192)
    weight = quantised(shape, 4, 32, "offsets", generator) if quantized else torch.randn(shape, generator=generator)
    mask = packed_mask(*shape, generator)
    x = torch.randn(3, 5, shape[1], generator=generator).requires_grad_()
    lora_A, lora_B = (factor.clone().requires_grad_() for factor in factors(*shape, 3, generator))
    seed = torch.randn(3, 5, shape[0], generator=generator)
    results = []
    calls: list[str] = []
    for kernels in (None, weights):
        for module in (delta, ordered):
            monkeypatch.setattr(module, "kernels_on", lambda device, dtype, found=kernels: calls.append("") or found)
        y = MaskedLinear.apply(x, weight, None, lora_A, lora_B, SCALING, mask, False, True)
        results.append([y, *torch.autograd.grad(y, [x, lora_A, lora_B], seed)])
    assert calls
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    assert torch.equal(results[0][0], results[1][0])
