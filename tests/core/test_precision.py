"""W' and Ŵ' are the same bits whatever float32 precision the process allows, and the user's setting stays."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sqft.core import delta
from sqft.core.delta import MaskedLinear, effective_codes, effective_weight
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.precision import ieee_products

CPU = torch.device("cpu")
KEYS = [(backend, operation) for backend in ("mkldnn", "cuda") for operation in ("matmul", "all")] + [
    ("generic", "all")
]


def in_force() -> dict[tuple[str, str], str]:
    return {key: torch._C._get_fp32_precision_getter(*key) for key in KEYS}


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def through_flags() -> None:
    torch.backends.mkldnn.set_flags(True, False, None, "bf16")


SETTINGS: dict[str, Callable[[], Any]] = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "mkldnn": lambda: torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16"),
    "mkldnn flags": through_flags,
    "all backends": lambda: torch._C._set_fp32_precision_setter("generic", "all", "tf32"),
    "allow_tf32": allow_tf32,
}


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.set_flags(True, False, None, "none")
    for key in KEYS:
        torch._C._set_fp32_precision_setter(*key, "none")


def factors(rank: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At rank 512 a processor without bfloat16 products shows the setting as well, by another order of the sum."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((512, 512), (rank, 512), (512, rank)))  # type: ignore[return-value]


def computed() -> list[torch.Tensor]:
    weight, lora_A, lora_B = factors()
    grid = Grid.fit(weight, bits=4, group_size=64, symmetric=False, dtype=torch.float32)
    quantized = QuantizedWeight(pack_codes(grid.quantize(weight), 4), grid, torch.float32)
    return [
        effective_weight(weight, lora_A, lora_B, 0.5),
        effective_weight(quantized, lora_A, lora_B, 0.005),
        effective_codes(quantized, lora_A, lora_B, 0.005),
    ]


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_changes_a_weight_and_none_is_changed(setting: str) -> None:
    expected = computed()
    SETTINGS[setting]()
    before, backend = in_force(), torch.backends.mkldnn.allow_tf32
    assert all(map(torch.equal, computed(), expected))
    assert in_force() == before
    assert torch.backends.mkldnn.allow_tf32 == backend


def test_without_the_pin_they_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = computed()
    torch.set_float32_matmul_precision("medium")
    _, lora_A, lora_B = factors()
    bare = lora_B @ lora_A
    with ieee_products(CPU):
        if torch.equal(bare, lora_B @ lora_A):
            pytest.skip("this processor multiplies float32 alike under every setting")
    monkeypatch.setattr(delta, "ieee_products", lambda device: nullcontext())
    assert not torch.equal(computed()[0], expected[0])


class Products(TorchDispatchMode):
    """Records the precision that each float32 product runs in, by the number of its inner terms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.append((args[0].shape[1], torch._C._get_fp32_precision_getter("mkldnn", "matmul")))
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_pin_the_weight_and_leave_the_layers_products_to_the_user() -> None:
    weight, lora_A, lora_B = factors(rank=7)
    x = torch.randn(3, 512, requires_grad=True)
    lora_A.requires_grad_(), lora_B.requires_grad_()
    torch.set_float32_matmul_precision("medium")
    with Products() as products:
        MaskedLinear.apply(x, weight, None, lora_A, lora_B, 0.5, None, False).sum().backward()
    pinned = [precision for terms, precision in products.seen if terms == 7]
    assert pinned == ["ieee"] * 2  # W' in forward, and again in backward
    assert {precision for terms, precision in products.seen if terms != 7} == {"bf16"}


def test_the_setting_goes_on_following_its_parent() -> None:
    torch._C._set_fp32_precision_setter("mkldnn", "all", "bf16")
    with ieee_products(CPU):
        assert in_force()["mkldnn", "matmul"] == "ieee"
    assert in_force()["mkldnn", "matmul"] == "bf16"
    torch._C._set_fp32_precision_setter("mkldnn", "all", "tf32")
    assert in_force()["mkldnn", "matmul"] == "tf32"


def test_threads_that_overlap_stay_exact_and_restore_once() -> None:
    torch.set_float32_matmul_precision("medium")
    second_inside, first_out, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with ieee_products(CPU):
            second_inside.set()
            first_out.wait(10)
            seen.append(in_force()["mkldnn", "matmul"])

    thread = threading.Thread(target=second)
    with ieee_products(CPU):
        thread.start()
        second_inside.wait(10)
    first_out.set()
    thread.join()
    assert seen == ["ieee"]
    assert in_force()["mkldnn", "matmul"] == "bf16"


def test_a_setting_that_is_made_inside_is_kept_and_an_error_restores() -> None:
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(RuntimeError, match="inside"), ieee_products(CPU):
        raise RuntimeError("inside")
    assert in_force()["mkldnn", "matmul"] == "bf16"
    with ieee_products(CPU):
        torch.set_float32_matmul_precision("high")
    assert in_force()["mkldnn", "matmul"] == "tf32"


def test_cuda_has_its_own_setting_and_other_devices_none() -> None:
    torch.set_float32_matmul_precision("medium")
    with ieee_products(torch.device("cuda")):
        assert in_force()["cuda", "matmul"] == "ieee"
        assert in_force()["mkldnn", "matmul"] == "bf16"
    assert in_force()["cuda", "matmul"] == "tf32"
    with ieee_products(torch.device("meta")):
        assert in_force()["mkldnn", "matmul"] == "bf16"
