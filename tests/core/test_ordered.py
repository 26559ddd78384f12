"""The ordered arithmetic against a loop over single numbers, and its gradients against autograd in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sqft.core import delta, ordered
from sqft.core.delta import MaskedLinear, effective_codes, effective_weight, empty_inside
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask
from sqft.core.ordered import ordered_product
from sqft.kernels import adapt

OUT, INPUTS, RANK, SCALING = 11, 12, 5, 0.7


@pytest.fixture(params=["kernel", "PyTorch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test by the compiled kernel and by PyTorch."""
    if request.param == "PyTorch":
        monkeypatch.setattr(delta, "kernels_on", lambda device, dtype: None)
    elif (reason := adapt.KERNEL.absence()) is not None:
        pytest.skip(reason)
    yield


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return (W, M, A, B) of float32."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(OUT, INPUTS, generator=generator) > 0.5
    weight = torch.randn(OUT, INPUTS, generator=generator) * mask
    lora_A = torch.randn(RANK, INPUTS, generator=generator)
    return weight, mask, lora_A, torch.randn(OUT, RANK, generator=generator)


def quantised(weight: torch.Tensor, start: str | None) -> QuantizedWeight:
    grid = Grid.fit(weight, bits=4, group_size=4, symmetric=False, dtype=torch.bfloat16)
    codes = grid.quantize(weight)
    begin = {None: None, "offsets": grid.offsets(weight, codes), "float": weight.half()}[start]
    return QuantizedWeight(pack_codes(codes, 4), grid, torch.bfloat16, begin)


def naive_delta(lora_A: torch.Tensor, lora_B: torch.Tensor) -> np.ndarray:
    """The definition, number by number, in numpy's float32, which fuses nothing."""
    a, b = (lora_A.numpy() * np.float32(SCALING)).astype(np.float32), lora_B.numpy()
    total = np.zeros((OUT, INPUTS), dtype=np.float32)
    for o in range(OUT):
        for i in range(INPUTS):
            for r in range(RANK):
                total[o, i] = np.float32(total[o, i] + np.float32(b[o, r] * a[r, i]))
    return total


def test_the_product_is_the_definition_to_the_bit() -> None:
    # Some seed must tell the order and the fused sum apart from the definition, or the test sees nothing.
    fused = reverse = 0
    for seed in range(5):
        _, _, lora_A, lora_B = tensors(seed)
        scaled = lora_A * SCALING
        found = ordered_product(lora_B, scaled)
        assert torch.equal(found, torch.from_numpy(naive_delta(lora_A, lora_B)))
        reverse += int((ordered_product(lora_B.flip(1), scaled.flip(0)) != found).sum())
        exact = torch.zeros(OUT, INPUTS)
        for r in range(RANK):
            exact = (exact.double() + lora_B[:, r : r + 1].double() * scaled[r].double()).float()
        fused += int((exact != found).sum())
    assert fused > 0
    assert reverse > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunk", [1 << 18, 64])
def test_w_prime_is_one_rounded_sum(
    dtype: torch.dtype, masked: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "CHUNK_BYTES", chunk)
    weight, mask, lora_A, lora_B = tensors()
    weight = weight.to(dtype)
    weight[~mask] = -0.0
    found = effective_weight(weight, lora_A, lora_B, SCALING, pack_mask(mask) if masked else None, ordered=True)
    total = weight.float() + torch.from_numpy(naive_delta(lora_A, lora_B))
    expected = torch.where(mask, total, weight.float()) if masked else total
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    if masked:
        assert found[~mask].signbit().all(), "a pruned -0 keeps its bits"


@pytest.mark.parametrize("start", [None, "offsets", "float"])
def test_the_quantised_weight_rounds_the_quotient_and_then_the_sum(start: str | None) -> None:
    weight, mask, lora_A, lora_B = tensors()
    packed = quantised(weight, start)
    inside = empty_inside(packed, ordered=True)
    given = (packed, lora_A, lora_B, SCALING, pack_mask(mask))
    found = effective_weight(*given, inside_OI=inside, ordered=True)
    codes = effective_codes(*given, ordered=True)
    scale = packed.grid.scale_OG.float().repeat_interleave(4, dim=1).numpy()
    zero = packed.grid.zero_codes().float().numpy()
    steps = packed.codes().float().numpy() - zero
    if start == "offsets":
        steps = steps + packed.start.float().numpy() / np.float32(256)
    if start == "float":
        steps = packed.start.float().numpy() / scale
    quotient = np.where(mask.numpy(), naive_delta(lora_A, lora_B), np.float32(0)) / scale
    position = np.rint(steps + quotient)
    clamped = np.clip(position, -zero, 15 - zero)
    assert torch.equal(codes, torch.from_numpy(clamped + zero).to(torch.uint8))
    assert torch.equal(found, torch.from_numpy(clamped * scale).bfloat16())
    assert torch.equal(inside, torch.from_numpy(position == clamped))
    assert 0 < int(inside.sum()) < inside.numel()
    assert not (found.signbit() & (found == 0)).any(), "a merged model has no -0 either"


def test_both_arithmetics_are_the_same_mathematics() -> None:
    weight, mask, lora_A, lora_B = tensors()
    one, other = (
        effective_weight(weight, lora_A, lora_B, SCALING, pack_mask(mask), ordered=ordered) for ordered in (True, False)
    )
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_are_autograds_in_float64(quantized: bool) -> None:
    weight, mask, lora_A, lora_B = tensors()
    lora_A, lora_B = lora_A.requires_grad_(), lora_B.requires_grad_()
    x = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(2)).requires_grad_()
    base = quantised(weight, None) if quantized else weight
    if isinstance(base, QuantizedWeight):
        base = QuantizedWeight(base.packed, base.grid, torch.float32)
    y = MaskedLinear.apply(x, base, None, lora_A, lora_B, SCALING, pack_mask(mask), False, True)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [x, lora_A, lora_B], seed)
    wide = [t.detach().double().requires_grad_() for t in (x, lora_A, lora_B)]
    update = wide[2] @ wide[1] * SCALING * mask
    if isinstance(base, QuantizedWeight):
        scale = base.grid.scale_OG.double().repeat_interleave(4, dim=1)
        zero = base.grid.zero_codes().double()
        position = base.codes().double() - zero + update / scale
        rounded = position + (position.round() - position).detach()
        effective = scale * rounded.clamp(min=-zero, max=15 - zero)
    else:
        effective = weight.double() + update
    expected = torch.autograd.grad(wide[0] @ effective.T, wide, seed.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-4, rtol=1e-4)


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sqft.kernels.weights", None)
    ordered._on_card.cache_clear()
    try:
        assert ordered.kernels_on(torch.device("cpu"), torch.float64) is None
        assert not caplog.records
        assert ordered.kernels_on(torch.device("cuda", 0), torch.float32) is None
        assert ordered.kernels_on(torch.device("cuda", 0), torch.float32) is None
    finally:
        ordered._on_card.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Triton is not installed" in caplog.text


def test_what_lies_on_a_gpu_is_brought_to_the_cpu_for_blas_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensors without data on a GPU that is not there."""
    where: list[str] = []
    chunks = delta._delta_chunks

    def watched(base: torch.Tensor, *given: object) -> object:
        where.append(base.device.type)
        return chunks(base, *given)

    monkeypatch.setattr(delta, "_delta_chunks", watched)
    with FakeTensorMode():
        weight = torch.empty(INPUTS, OUT, device="cuda").T
        factors = torch.empty(RANK, INPUTS, device="cuda"), torch.empty(OUT, RANK, device="cuda")
        found = effective_weight(weight, *factors, SCALING)
        assert (found.device.type, found.shape, found.stride()) == ("cuda", weight.shape, weight.stride())
        packed, start = (torch.empty(OUT, n, dtype=d, device="cuda") for n, d in ((6, torch.uint8), (12, torch.int8)))
        scale, zero = (torch.empty(OUT, 3, dtype=d, device="cuda") for d in (torch.bfloat16, torch.uint8))
        base = QuantizedWeight(packed, Grid(scale, zero, 4, INPUTS, False), torch.bfloat16, start)
        found, codes = effective_weight(base, *factors, SCALING), effective_codes(base, *factors, SCALING)
    assert {t.device.type for t in (found, codes)} == {"cuda"}
    assert (found.dtype, codes.dtype, found.shape) == (torch.bfloat16, torch.uint8, (OUT, INPUTS))
    assert where == ["cpu"] * 3
