"""bfloat16 products in float32: the sums of float64 to the last rounding, forward and backward, where they pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sqft.core import bfloat16
from sqft.core.bfloat16 import fast_products


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "multiplies_bfloat16", lambda: False)


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "baddbmm")}


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the dtypes that products are computed in, below the mode under test."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.seen.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """To one rounding to bfloat16, of a sum that float32 holds to 2^-20."""
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_float64_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias).bfloat16()
    x = torch.randn(2, 20, 48).bfloat16().requires_grad_()
    grad = torch.randn(2, 20, 32).bfloat16()
    with Counted() as counted, fast_products(layer):
        y = layer(x)
        y.backward(grad)
    assert counted.seen == [torch.float32] * 3
    assert x.grad is not None
    assert layer.weight.grad is not None
    offset = layer.bias.double() if bias else 0
    close(y.detach(), (x.double() @ layer.weight.double().T + offset).detach())
    close(x.grad, grad.double() @ layer.weight.detach().double())
    close(layer.weight.grad, grad.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1))


@pytest.mark.usefixtures("slow")
def test_attention_products_too() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 24, 16).bfloat16(), torch.randn(2, 3, 24, 16).bfloat16()
    with Counted() as counted, fast_products(nn.Linear(2, 2).bfloat16()):
        scores = q @ k.transpose(-1, -2)
    assert counted.seen == [torch.float32]
    close(scores, q.double() @ k.double().transpose(-1, -2))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_weights_rows_are_one_product(frozen: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False).bfloat16().requires_grad_(not frozen)
    x = torch.randn(8, 9, 48).bfloat16()[:, 2:5]
    with torch.no_grad(), Counted() as counted, fast_products(layer):
        y = layer(x)
    assert (len(counted.seen), counted.seen[0]) == (1, torch.float32)  # 24 rows, where a batch has 3
    close(y, (x.double() @ layer.weight.double().T).detach())


@pytest.mark.usefixtures("slow")
def test_few_rows_and_other_dtypes_are_left_alone() -> None:
    layer = nn.Linear(48, 32).bfloat16()
    x = torch.randn(4, 48).bfloat16()
    with Counted() as counted, fast_products(layer):
        few = layer(x)
        functional.linear(torch.randn(20, 8), torch.randn(20, 8))
    assert counted.seen == [torch.bfloat16, torch.float32]
    assert torch.equal(few, layer(x))
    with Counted() as counted, fast_products(nn.Linear(2, 2)):  # a float32 model
        layer(torch.randn(20, 48).bfloat16())
    assert counted.seen == [torch.bfloat16]


def test_a_processor_that_multiplies_bfloat16_does_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16.platform, "machine", lambda: "aarch64")
    layer = nn.Linear(48, 32).bfloat16()
    with Counted() as counted, fast_products(layer):
        layer(torch.randn(20, 48).bfloat16())
    assert counted.seen == [torch.bfloat16]
    monkeypatch.setattr(bfloat16.platform, "machine", lambda: "x86_64")
    for amx, avx, expected in ((True, False, True), (False, True, True), (False, False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert bfloat16.multiplies_bfloat16() is expected
