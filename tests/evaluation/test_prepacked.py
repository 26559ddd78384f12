"""Weights in the layout of the processor's kernels: the same bits, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from sqft.core import bfloat16 as core_bfloat16
from sqft.core.bfloat16 import fast_products
from sqft.evaluation import prepacked as module
from sqft.evaluation.prepacked import prepacked, stock_products

FORM = module._form


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are the same on every processor that has the kernels, whether it uses them or not."""
    monkeypatch.setattr(module, "_form", lambda: module._Reordered)


@pytest.fixture(autouse=True)
def one_thread(_threads: None) -> None:
    """On several threads oneDNN may cut a sum otherwise, and bits differ."""
    torch.set_num_threads(1)


needs_kernels = pytest.mark.skipif(not module._has_kernels(), reason="this processor has no bfloat16 products")


def model_of(*linears: nn.Module) -> Any:
    return cast("Any", nn.Sequential(*linears))


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (70, 300), (1, 16), (256, 1)])
def test_the_product_is_the_same_to_the_bit(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
    model = model_of(linear)
    for rows in (1, 2, 7, 64, 333):
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
        with torch.no_grad():
            expected = model(x)
            with prepacked(model) as count:
                assert count == 1
                assert torch.equal(model(x), expected)
                assert torch.equal(model(x.reshape(rows, 1, -1)), expected.reshape(rows, 1, -1))
    assert "forward" not in vars(linear)


@needs_kernels
def test_only_what_can_be_reordered_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    half = nn.Linear(4, 4, dtype=torch.bfloat16)
    packed = nn.Linear(4, 4)
    del packed.weight  # as compressed-tensors leaves it until the first forward
    model = model_of(half, nn.Linear(4, 4), Own(4, 4, dtype=torch.bfloat16), packed)
    with prepacked(model) as count:
        assert count == 1
        with prepacked(model) as again:  # what is reordered already stays so
            assert again == 0
        assert "forward" in vars(half)
    with stock_products(), prepacked(model) as count:
        assert count == 0
    monkeypatch.setattr(module, "MOST_BYTES", 31)
    with prepacked(model) as count:
        assert count == 0


@pytest.mark.parametrize("form", [pytest.param(module._Reordered, marks=needs_kernels), module._InFloat32])
def test_weights_that_a_library_unpacks_are_laid_out(
    form: Any, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.adapters.attach import load_model
    from sqft.context import Context
    from sqft.recipe import QuantizeConfig
    from sqft.stages import quantize

    config = QuantizeConfig(method="rtn", group_size=16)
    quantize.run(config, tiny_model("llama", "bfloat16"), None, tmp_path / "int4", Context())
    monkeypatch.setattr(module, "_form", lambda: form)
    monkeypatch.setattr(core_bfloat16, "multiplies_bfloat16", lambda: form is module._Reordered)
    models = [load_model(tmp_path / "int4").eval() for _ in range(2)]
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), fast_products(models[0]):
        expected = models[0](input_ids=ids).logits
    with torch.no_grad(), prepacked(models[1]) as count:
        assert count == 15  # two blocks of seven linears and the head
        assert torch.equal(models[1](input_ids=ids).logits, expected)
    with torch.no_grad(), fast_products(models[1]):
        assert torch.equal(models[1](input_ids=ids).logits, expected)


@pytest.mark.parametrize("form", [pytest.param(module._Reordered, marks=needs_kernels), module._InFloat32])
def test_an_error_leaves_the_model_as_it_was(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_form", lambda: form)
    linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="stop"), prepacked(model_of(linear)):
        raise RuntimeError("stop")
    assert "forward" not in vars(linear)


@pytest.mark.parametrize(
    ("bfloat16", "amx", "kernels", "form"),
    [
        pytest.param(True, True, True, module._Reordered, marks=needs_kernels),
        (True, True, False, None),
        (True, False, True, None),
        (False, False, False, module._InFloat32),
    ],
)
def test_every_processor_has_its_form(
    bfloat16: bool, amx: bool, kernels: bool, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(module, "_has_kernels", lambda: kernels)
    monkeypatch.setattr(module, "_form", FORM)
    assert module._form() is form
    with prepacked(model_of(nn.Linear(4, 4, dtype=torch.bfloat16))) as count:
        assert count == (form is not None)


@pytest.fixture
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bfloat16 instructions."""
    monkeypatch.setattr(core_bfloat16, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(module, "_form", lambda: module._InFloat32)


@pytest.mark.usefixtures("_slow")
@pytest.mark.parametrize("bias", [False, True])
def test_in_float32_the_bits_are_those_of_exchanged_products(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 64, bias=bias, dtype=torch.bfloat16)
    model = model_of(linear)
    for rows in (1, 15, 16, 70):
        x = torch.randn(rows, 48, dtype=torch.bfloat16)
        with torch.no_grad():
            with fast_products(linear):
                expected = linear(x)
            with prepacked(model) as count:
                assert count == 1
                found = model(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_slow")
@pytest.mark.parametrize(
    ("arch", "attention", "left"), [("llama", "sdpa", False), ("llama", "eager", True), ("mixtral", "sdpa", True)]
)
def test_what_is_not_laid_out_has_its_products_exchanged(
    arch: str, attention: str, left: bool, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.adapters.attach import load_model

    model = load_model(tiny_model(arch, "bfloat16"), attention=attention)
    exchanged = []
    monkeypatch.setattr(module, "fast_products", lambda model: exchanged.append(model) or nullcontext())
    with prepacked(model) as count:
        assert count > 0
    assert bool(exchanged) == left


@needs_kernels
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_cached_weights_are_reordered_and_their_bases_are_not(kind: str, tiny_model: Callable[..., Path]) -> None:
    from peft import get_peft_model

    from sqft import SqftConfig
    from sqft.adapters.attach import load_model
    from sqft.adapters.cached import cached_weights
    from sqft.adapters.layers import sqft_layers

    torch.manual_seed(0)
    config = SqftConfig(kind=cast("Any", kind), ranks=[4], target_modules=["q_proj", "down_proj"])
    model = cast("Any", get_peft_model(load_model(tiny_model("qwen2", "bfloat16")), config)).eval()
    for layer in sqft_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), cached_weights(model):
        expected = model(input_ids=ids).logits
        with prepacked(model) as count:
            assert torch.equal(model(input_ids=ids).logits, expected)
            linears = [name for name, part in model.named_modules() if "forward" in vars(part)]
        cached = {name for name, layer in sqft_layers(model).items() if layer.cached is not None}
    assert len(cached) == (4 if kind == "sparse" else 0)
    # Two blocks of seven linears and the head; LoRA's own factors are float32.
    assert count == len(linears) == 15
    assert not [name for name in linears if kind == "sparse" and ".base_layer" in name]
    assert not [name for name, part in model.named_modules() if "forward" in vars(part)]
