"""The C++ kernel against the PyTorch path, to the bit, on every form that a base has and for every processor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sqft.core import delta, ordered
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask, unpack_mask
from sqft.kernels import adapt, build

SCALING = 0.7
BITS_OF = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
SHAPES = [(7, 12, 4), (33, 576, 64), (5, 72, 72), (130, 200, 8), (1, 64, 32)]


@pytest.fixture(autouse=True)
def needs_the_kernel() -> None:
    if (reason := adapt.KERNEL.absence()) is not None:
        pytest.skip(reason)


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "kernels_on", lambda device, dtype: None)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def quantised(weight: torch.Tensor, bits: int, group: int, start: str | None, dtype: torch.dtype) -> QuantizedWeight:
    grid = Grid.fit(weight, bits=bits, group_size=group, symmetric=bits == 8, dtype=torch.float16)
    codes = grid.quantize(weight)
    begin = {None: None, "offsets": grid.offsets(weight, codes), "half": weight.half(), "bf16": weight.bfloat16()}
    return QuantizedWeight(pack_codes(codes, bits), grid, dtype, begin[start])


def tensors(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, ...]:
    """Return (W with zeros, M, A, B); the delta drives some weights out of the grid."""
    generator = torch.Generator().manual_seed(rows * columns + rank)
    mask = torch.rand(rows, columns, generator=generator) > 0.5
    weight = torch.randn(rows, columns, generator=generator) * mask
    factors = torch.randn(rank, columns, generator=generator) * 0.2, torch.randn(rows, rank, generator=generator) * 0.3
    return weight, mask, *factors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.dtype == other.dtype
    assert one.stride() == other.stride()
    return torch.equal(*(each.contiguous().view(BITS_OF.get(each.dtype, each.dtype)) for each in (one, other)))


@pytest.mark.usefixtures("by_pytorch", "threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_of_a_base(shape: tuple[int, int, int], masked: bool, dtype: torch.dtype) -> None:
    rows, columns, group = shape
    clamped = 0
    for rank in (1, 5, 32):
        weight, mask, lora_A, lora_B = tensors(rows, columns, rank)
        packed, factors = pack_mask(mask) if masked else None, (lora_A * SCALING, lora_B)
        base = weight.to(dtype)
        base[~mask] = -0.0
        for each in (base, base.T.contiguous().T):
            expected = delta.effective_weight(each, lora_A, lora_B, SCALING, packed, ordered=True)
            assert same_bits(adapt.effective_weight(each, *factors, packed), expected)
        for bits in (2, 3, 4, 8):
            for start in (None, "offsets", "half", "bf16"):
                grid = quantised(weight, bits, group, start, dtype)
                given = (grid, lora_A, lora_B, SCALING, packed)
                expected_inside, inside = torch.empty(grid.shape, dtype=torch.bool), adapt.empty_inside(grid)
                expected = delta.effective_weight(*given, inside_OI=expected_inside, ordered=True)
                assert same_bits(adapt.effective_quantized(grid, *factors, packed, inside), expected)
                assert torch.equal(inside, expected_inside)
                assert torch.equal(
                    adapt.effective_codes(grid, *factors, packed), delta.effective_codes(*given, ordered=True)
                )
                assert same_bits(adapt.dequantized(grid), delta.dequantized(grid))
                clamped += int((~inside).sum())
    assert clamped > 0


@pytest.mark.usefixtures("by_pytorch")
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_every_processor_repeats_the_bits(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if capability in build.VECTORS and not getattr(torch.cpu, f"_is_{capability.lower()}_supported")():
        pytest.skip(f"no {capability} here")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(adapt, "KERNEL", build.Kernel(adapt._load, adapt.KERNEL._otherwise))
    weight, mask, lora_A, lora_B = tensors(33, 576, 32)
    factors, packed = (lora_A * SCALING, lora_B), pack_mask(mask)
    grid = quantised(weight, 4, 64, "offsets", torch.bfloat16)
    expected = delta.effective_weight(grid, lora_A, lora_B, SCALING, packed, ordered=True)
    assert same_bits(adapt.effective_quantized(grid, *factors, packed), expected)
    expected = delta.effective_weight(weight.float(), lora_A, lora_B, SCALING, packed, ordered=True)
    assert same_bits(adapt.effective_weight(weight.float(), *factors, packed), expected)


@pytest.mark.usefixtures("by_pytorch")
def test_numbers_that_are_none_stay_so() -> None:
    weight, mask, lora_A, lora_B = tensors(8, 64, 2)
    lora_B[0, 0], lora_B[1, 0], lora_A[0, 3] = float("nan"), float("inf"), 1e30
    packed, factors = pack_mask(mask), (lora_A * SCALING, lora_B)
    for dtype in (torch.bfloat16, torch.float32):
        expected = delta.effective_weight(weight.to(dtype), lora_A, lora_B, SCALING, packed, ordered=True)
        found = adapt.effective_weight(weight.to(dtype), *factors, packed)
        assert found.isnan().any()
        assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
        grid = quantised(weight, 4, 32, "offsets", dtype)
        inside, expected_inside = adapt.empty_inside(grid), torch.empty(grid.shape, dtype=torch.bool)
        expected = delta.effective_weight(
            grid, lora_A, lora_B, SCALING, packed, inside_OI=expected_inside, ordered=True
        )
        found = adapt.effective_quantized(grid, *factors, packed, inside)
        assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(inside, expected_inside)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gradient_is_masked_in_place(dtype: torch.dtype) -> None:
    for rows, columns, _ in SHAPES:
        _, mask, _, _ = tensors(rows, columns, 1)
        inside = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > 0.3
        for packed in (pack_mask(mask), None):
            for within in (inside, None):
                values = torch.randn(rows, columns).to(dtype)
                kept = torch.ones_like(mask) if packed is None else unpack_mask(packed, columns)
                expected = torch.where(kept if within is None else kept & within, values, 0)
                adapt.mask_(values, packed, within)
                assert torch.equal(values, expected)


def test_fake_tensors_are_not_touched() -> None:
    with FakeTensorMode():
        found = adapt.effective_weight(torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(4, 2), None)
        adapt.mask_(found, None, None)
    assert found.shape == (4, 8)


def test_without_a_compiler_it_is_blas(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    assert ordered.suits(cpu, torch.bfloat16)
    assert not ordered.suits(cpu, torch.float64)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(adapt, "KERNEL", build.Kernel(adapt._load, adapt.KERNEL._otherwise))
    ordered._on_processor.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "sqft"):
            assert not ordered.suits(cpu, torch.bfloat16)
            assert not ordered.suits(cpu, torch.float32)
        assert len([line for line in caplog.messages if "adapted weights are computed by PyTorch" in line]) == 1
        assert "install g++ or clang++" in str(adapt.KERNEL.absence())
        assert ordered.suits(torch.device("cuda"), torch.bfloat16)
    finally:
        ordered._on_processor.cache_clear()
