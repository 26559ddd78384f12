"""Weights in the layout of the processor's kernels: the same bits, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from sqft.evaluation import prepacked as module
from sqft.evaluation.prepacked import prepacked, stock_products


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are the same on every processor that has the kernels, whether it uses them or not."""
    monkeypatch.setattr(module, "_gains", lambda: True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On several threads oneDNN may cut a sum otherwise, and bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    model.is_quantized = True
    with prepacked(model) as count:
        assert count == 0
    model.is_quantized = False
    with stock_products(), prepacked(model) as count:
        assert count == 0
    monkeypatch.setattr(module, "MOST_BYTES", 31)
    with prepacked(model) as count:
        assert count == 0


def test_an_error_leaves_the_model_as_it_was() -> None:
    linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="stop"), prepacked(model_of(linear)):
        raise RuntimeError("stop")
    assert "forward" not in vars(linear)


@pytest.mark.parametrize("lacks", ["_has_kernels", "_gains"])
def test_another_processor_runs_stock_linears(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, lacks, lambda: False)
    with prepacked(model_of(nn.Linear(4, 4, dtype=torch.bfloat16))) as count:
        assert count == 0


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
