"""W' and its gradients against the plain formula under autograd, in float32, bfloat16 and autocast."""

import pytest
import torch
from torch.nn import functional

from sqft.core import delta
from sqft.core.delta import FrozenLinear, MaskedLinear, dequantized, effective_codes, effective_weight
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask

SCALING = 1.5


def tensors(dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (24, 20, 4)) -> dict[str, torch.Tensor]:
    out, inputs, rank = shape
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(out, inputs, generator=generator) > 0.5
    return {
        "weight": (torch.randn(out, inputs, generator=generator) * mask).to(dtype),
        "mask": mask,
        "A": torch.randn(rank, inputs, generator=generator).requires_grad_(),
        "B": torch.randn(out, rank, generator=generator).requires_grad_(),
        "bias": torch.randn(out, generator=generator).to(dtype),
        "x": torch.randn(2, 5, inputs, generator=generator).to(dtype).requires_grad_(),
    }


def plain(t: dict[str, torch.Tensor], *, masked: bool) -> torch.Tensor:
    update = t["B"] @ t["A"] * SCALING
    return t["weight"].float() + (update * t["mask"] if masked else update)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_effective_weight_is_the_formula_rounded_once(
    masked: bool, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "_CHUNK_BYTES", chunk)
    t = tensors(dtype)
    packed = pack_mask(t["mask"]) if masked else None
    result = effective_weight(t["weight"], t["A"], t["B"], SCALING, packed)
    assert result.dtype == dtype
    expected = plain(t, masked=masked).detach()
    assert torch.allclose(result.float(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert not torch.equal(result, t["weight"])
    if masked:
        assert (result[~t["mask"]] == 0).all()


def test_effective_weight_ignores_autocast() -> None:
    t = tensors(torch.bfloat16)
    outside = effective_weight(t["weight"], t["A"], t["B"], SCALING, pack_mask(t["mask"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = effective_weight(t["weight"], t["A"], t["B"], SCALING, pack_mask(t["mask"]))
    assert torch.equal(outside, inside)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_equal_autograd_of_the_formula(transposed: bool, masked: bool) -> None:
    t = tensors()
    packed = pack_mask(t["mask"]) if masked else None
    stored = t["weight"].T.contiguous() if transposed else t["weight"]
    bias = t["bias"].clone().requires_grad_()
    y = MaskedLinear.apply(t["x"], stored, bias, t["A"], t["B"], SCALING, packed, transposed)
    expected = functional.linear(t["x"], plain(t, masked=masked), bias)
    assert torch.allclose(y, expected, atol=1e-5)
    seed = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, [t["x"], bias, t["A"], t["B"]], seed)
    found = torch.autograd.grad(y, [t["x"], bias, t["A"], t["B"]], seed)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bfloat16_gradients_are_near_float32_ones() -> None:
    exact, rounded = tensors(shape=(96, 80, 8)), tensors(torch.bfloat16, shape=(96, 80, 8))
    grads = []
    for t in (exact, rounded):
        y = MaskedLinear.apply(t["x"], t["weight"], None, t["A"], t["B"], SCALING, pack_mask(t["mask"]), False)
        grads.append(torch.autograd.grad(y.float().square().sum(), [t["A"], t["B"]]))
    for precise, coarse in zip(*grads, strict=True):
        assert coarse.dtype == torch.float32
        assert float((precise - coarse).norm() / precise.norm()) < 0.02


def test_autocast_computes_in_bfloat16_and_keeps_the_input_gradients_dtype() -> None:
    t = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = MaskedLinear.apply(t["x"], t["weight"], t["bias"], t["A"], t["B"], SCALING, pack_mask(t["mask"]), False)
        merged = effective_weight(t["weight"], t["A"], t["B"], SCALING, pack_mask(t["mask"]))
        assert torch.equal(y, functional.linear(t["x"], merged, t["bias"]))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert t["x"].grad is not None
    assert t["x"].grad.dtype == torch.float32


def test_nothing_of_the_weights_size_is_saved_or_differentiated_needlessly() -> None:
    t = tensors()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = MaskedLinear.apply(t["x"], t["weight"], None, t["A"], t["B"], SCALING, pack_mask(t["mask"]), False)
    full = [s for s in saved if s.numel() == t["weight"].numel()]
    assert not full
    (grad,) = torch.autograd.grad(y.sum(), [t["A"]])
    assert grad.shape == t["A"].shape


def test_a_frozen_adapter_passes_the_input_gradient() -> None:
    t = tensors()
    y = MaskedLinear.apply(
        t["x"], t["weight"], None, t["A"].detach(), t["B"].detach(), SCALING, pack_mask(t["mask"]), False
    )
    (grad,) = torch.autograd.grad(y.sum(), [t["x"]])
    assert torch.allclose(grad[0, 0], plain(t, masked=True).sum(dim=0), atol=1e-4)


def quantised(
    bits: int = 3, start: str = "compensated"
) -> tuple[QuantizedWeight, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (packed weight, its starting weight in float32, tensors whose delta reaches beyond the grid)."""
    t = tensors()
    weight = t["weight"].detach() * t["mask"]
    grid = Grid.fit(weight, bits=bits, group_size=4, symmetric=False, dtype=torch.float32)
    codes = grid.quantize(weight)
    scale = grid.scale_OG.repeat_interleave(4, dim=1)
    steps = codes.float() - grid.zero_codes().float()
    offsets = grid.offsets(weight, codes)
    given = {"compensated": offsets, "dequantized": None, "float": weight}[start]
    begin = {"compensated": scale * (steps + offsets / 256), "dequantized": scale * steps, "float": weight}[start]
    return QuantizedWeight(pack_codes(codes, bits), grid, torch.float32, given), begin, t


@pytest.mark.parametrize("start", ["compensated", "dequantized", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantised_gradients_are_autograds_of_the_plain_formula(bits: int, start: str) -> None:
    packed, begin, t = quantised(bits, start)
    grid = packed.grid
    scale = grid.scale_OG.repeat_interleave(4, dim=1)
    zero = grid.zero_codes().float()
    y = MaskedLinear.apply(t["x"], packed, t["bias"], t["A"], t["B"], SCALING, pack_mask(t["mask"]), False)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad((y * weights).sum(), [t["x"], t["A"], t["B"]])
    # Equations 3 and 4 with a straight-through rounding; clamp's own gradient is zero outside.
    position = (begin + SCALING * (t["B"] @ t["A"]) * t["mask"]) / scale
    rounded = position + (position.round() - position).detach()
    effective = scale * rounded.clamp(min=-zero, max=2**bits - 1 - zero)
    expected = t["x"] @ effective.T + t["bias"]
    assert (effective != scale * rounded).any(), "nothing is clamped, so the test would not see it"
    assert torch.allclose(y, expected, atol=1e-5)
    theirs = torch.autograd.grad((expected * weights).sum(), [t["x"], t["A"], t["B"]])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    codes = effective_codes(packed, t["A"].detach(), t["B"].detach(), SCALING, pack_mask(t["mask"]))
    assert torch.equal(codes.float() - zero, (effective / scale).round())
    assert torch.equal(codes[~t["mask"]], grid.zero_codes()[~t["mask"]])


def test_a_frozen_packed_linear_is_its_dequantised_one() -> None:
    packed, _, t = quantised()
    y = FrozenLinear.apply(t["x"], packed, t["bias"])
    plain_y = t["x"] @ dequantized(packed).T + t["bias"]
    assert torch.allclose(y, plain_y, atol=1e-6)
    (one,) = torch.autograd.grad(y.sum(), [t["x"]])
    (other,) = torch.autograd.grad(plain_y.sum(), [t["x"]])
    assert torch.allclose(one, other, atol=1e-5)
