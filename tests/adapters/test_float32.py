"""Training in float32 over bfloat16 weights: the model that is trained is the one that is merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ARCHITECTURES
from sqft.adapters import float32
from sqft.adapters.attach import load_model
from sqft.adapters.float32 import compute_in_float32
from sqft.adapters.layers import SqftLinear, sqft_layers
from sqft.adapters.masked import SqftMaskedLinear
from sqft.recipe import FinetuneConfig
from sqft.stages.finetune import attach

IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "multiplies_bfloat16", lambda: False)


def adapted(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    model = attach(load_model(folder, packed=True), FinetuneConfig(kind=kind, ranks=[4])).train()
    for layer in sqft_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    for module in model.modules():
        for dropout in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    return model


def merged(layer: SqftLinear) -> torch.Tensor:
    """The weight that the layer multiplies with, in float64, in the base's layout."""
    if isinstance(layer, SqftMaskedLinear):
        assert layer.base_dtype == torch.bfloat16
        return layer._in_layout(layer.effective()).double()
    lora_A, lora_B = layer.factors("default")
    return layer._in_layout(layer.float_weight().double() + layer.scaling["default"] * (lora_B @ lora_A).double())


def loss(model: Any) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loss_is_that_of_the_merged_model(arch: str, kind: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(arch, torch.bfloat16)
    model, oracle = adapted(folder, kind), load_model(folder)
    assert compute_in_float32(model)
    with torch.no_grad():
        for name, layer in sqft_layers(model).items():
            oracle.get_submodule(name).float().weight.copy_(merged(layer))
    found, wanted = loss(model), loss(oracle.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=0)
    found.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
