"""The arithmetic of an adapter: chosen once, saved with it, and repeated by loading, merging and verifying."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.layers import sqft_layers
from sqft.adapters.merged import BaseWeights
from sqft.adapters.saved import SavedAdapter, write_sub_adapter
from sqft.context import Context
from sqft.core import ordered
from sqft.errors import InputError
from sqft.kernels import adapt
from sqft.recipe.settings import MergeConfig, QuantizeConfig, SparsifyConfig, VerifyConfig
from sqft.stages import merge, quantize, sparsify, verify

IDS = (torch.arange(24).reshape(2, 12) * 5 + 3) % 250
TARGETS = ["q_proj", "up_proj", "down_proj"]


def config(kind: str = "sparse", **options: Any) -> SqftConfig:
    return SqftConfig(task_type="CAUSAL_LM", kind=kind, r=4, lora_alpha=8, target_modules=TARGETS, **options)


def base_of(kind: str, model: Path, out: Path) -> Path:
    tokens = (torch.arange(6 * 32).reshape(6, 32) * 7 + 1) % 250
    pruned = SparsifyConfig(sparsity=0.5)
    if kind == "sparse":
        sparsify.run(pruned, model, tokens, out, Context())
    else:
        quantize.run(QuantizeConfig(group_size=16), model, tokens, out, Context(), sparsify=pruned)
    return out


def trained(base: Path, kind: str, arithmetic: str | None, out: Path) -> Any:
    """Two steps of gradient descent, saved."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base, packed=True), config(kind, arithmetic=arithmetic)).train()
    for layer in sqft_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        gradients = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient.abs().sum() > 0
            parameter.data -= 0.5 * gradient
    model.save_pretrained(str(out))
    return model.eval()


def merged_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    saved = SavedAdapter.open(adapter)
    weights = BaseWeights(base, saved)
    return {name: weights.merged(name, low).tensor for name, low in saved.modules.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "dtype"), [("sparse", "float32"), ("sparse", "bfloat16"), ("quantized", "float32")])
def test_an_ordered_adapter_trains_loads_merges_and_verifies_in_its_arithmetic(
    kind: str, dtype: str, tiny_model: Any, tmp_path: Path
) -> None:
    base = base_of(kind, tiny_model("llama", dtype), tmp_path / "base")
    live = trained(base, kind, "ordered", tmp_path / "adapter")
    assert all(layer.ordered for layer in sqft_layers(live).values())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["arithmetic"] == "ordered"
    with torch.no_grad():
        expected = live(input_ids=IDS).logits
        loaded = load_model(base, tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())
        assert torch.equal(load_model(tmp_path / "merged", packed=kind == "quantized")(input_ids=IDS).logits, expected)
        live.merge_adapter()
        assert torch.equal(live(input_ids=IDS).logits, expected)
    result = verify.run(
        VerifyConfig(prompts=2), tmp_path / "merged", base, tmp_path / "adapter", tmp_path / "v.json", Context()
    )
    assert result["passed"], [check for check in result["checks"] if not check["passed"]]
    # The arithmetics differ, or all this would show nothing.
    in_order = merged_weights(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "arithmetic": "blas"}))
    if dtype == "float32" and kind == "sparse":
        assert not same(in_order, merged_weights(base, tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["sparse", "quantized"])
def test_an_adapter_saved_without_the_field_is_one_of_blas(
    kind: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(kind, tiny_model("llama"), tmp_path / "base")
    live = trained(base, kind, "blas", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["arithmetic"] == "blas"
    now = merged_weights(base, tmp_path / "adapter")
    for without in (("arithmetic",), ("arithmetic", "base_identity")) if kind == "sparse" else (("arithmetic",),):
        file.write_text(json.dumps({name: value for name, value in saved.items() if name not in without}))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        adapter = SavedAdapter.open(tmp_path / "adapter")
        monkeypatch.undo()
        assert not adapter.ordered
        assert adapter.settings.arithmetic == "blas"  # type: ignore[attr-defined]
        assert same(now, merged_weights(base, tmp_path / "adapter"))
        loaded = load_model(base, tmp_path / "adapter")
        assert not any(layer.ordered for layer in sqft_layers(loaded).values())
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=IDS).logits, live(input_ids=IDS).logits)


def test_the_default_is_the_one_for_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config().arithmetic == ("ordered" if adapt.available() else "blas")
    monkeypatch.setattr(ordered, "kernels_on", lambda device, dtype: None)
    assert config().arithmetic == "blas"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config().arithmetic == config("quantized").arithmetic == "ordered"
    assert config(arithmetic="blas").arithmetic == "blas"
    assert config("dense").arithmetic is None
    with pytest.raises(InputError, match="arithmetic is 'exact'; use blas or ordered"):
        config(arithmetic="exact")


def test_a_dense_adapter_says_nothing_of_it(tiny_model: Any, tmp_path: Path) -> None:
    model = get_peft_model(load_model(tiny_model("llama")), config("dense"))
    model.save_pretrained(str(tmp_path))
    assert "arithmetic" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert not any(layer.ordered for layer in sqft_layers(model).values())
    assert not SavedAdapter.open(tmp_path).ordered


def test_adapters_of_one_layer_share_it(tiny_model: Any, tmp_path: Path) -> None:
    base = base_of("sparse", tiny_model("llama"), tmp_path / "base")
    model = get_peft_model(load_model(base), config(arithmetic="ordered"))
    model.add_adapter("same", config(arithmetic="ordered"))
    with pytest.raises(InputError, match="arithmetic 'blas', not 'ordered' as the model's first adapter has"):
        model.add_adapter("other", config(arithmetic="blas"))


def test_a_sub_adapter_keeps_it(tiny_model: Any, tmp_path: Path) -> None:
    base = base_of("sparse", tiny_model("llama"), tmp_path / "base")
    trained(base, "sparse", "ordered", tmp_path / "adapter")
    saved = SavedAdapter.open(tmp_path / "adapter")
    (tmp_path / "part").mkdir()
    write_sub_adapter(saved, dict.fromkeys(saved.modules, 2), tmp_path / "part")
    assert SavedAdapter.open(tmp_path / "part").ordered
