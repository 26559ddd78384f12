"""Masks and starts are parameters that nothing trains, casts or saves, and attaching dequantises no weight."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

import forked
from sqft import SqftConfig, load_model
from sqft.adapters.layers import sqft_layers
from sqft.context import Context
from sqft.core.grid import QuantizedWeight
from sqft.recipe import CalibrationConfig, QuantizeConfig, SparsifyConfig
from sqft.stages import quantize, sparsify

STARTS = ["compensated", "dequantized", "float"]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sparse and a sparse INT4 model, by the kind of adapter that they take."""
    out = tmp_path_factory.mktemp("bases")
    tokens = torch.randint(4, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    sparsify.run(
        SparsifyConfig(sparsity=0.5, method="magnitude"), tiny_model("llama"), tokens, out / "sparse", Context()
    )
    config = QuantizeConfig(group_size=16, calibration=CalibrationConfig(samples=4, length=16))
    quantize.run(config, out / "sparse", tokens, out / "quantized", Context())
    return {"sparse": out / "sparse", "quantized": out / "quantized", "dense": out / "quantized"}


def adapted(bases: dict[str, Path], kind: str, **settings: Any) -> Any:
    base = load_model(bases[kind], packed=kind != "sparse")
    config = SqftConfig(task_type="CAUSAL_LM", kind=kind, r=4, lora_alpha=8, target_modules=TARGETS, **settings)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    for layer in sqft_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return model


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(("mask_packed", "start_bytes"))}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 20).view(2, 8)).logits


@pytest.mark.parametrize(("kind", "start"), [("sparse", STARTS[0]), *(("quantized", start) for start in STARTS)])
def test_they_are_parameters_of_bytes_that_casts_copies_and_steps_leave_alone(
    kind: str, start: str, bases: dict[str, Path]
) -> None:
    model = adapted(bases, kind, start=start)
    parts = frozen(model)
    assert len(parts) == 4 * (2 if kind == "quantized" and start != "dequantized" else 1)
    assert all(p.dtype == torch.uint8 and not p.requires_grad for p in parts.values())
    assert not [name for name, _ in model.named_buffers() if name.endswith(("mask_packed", "start_bytes"))]
    before = {name: p.clone() for name, p in parts.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()(input_ids=torch.arange(4, 20).view(2, 8), labels=torch.arange(4, 20).view(2, 8)).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    model.to(torch.bfloat16)
    model.to(torch.float16)
    assert all(torch.equal(p, before[name]) for name, p in frozen(model).items())
    for layer in sqft_layers(model).values():
        if kind == "quantized":
            expected = {"compensated": torch.int8, "dequantized": None, "float": torch.float32}[start]
            assert (layer.start is None) if expected is None else (layer.start.dtype == expected)


@pytest.mark.parametrize("kind", ["sparse", "quantized"])
def test_they_are_neither_saved_nor_trained_and_a_saved_adapter_finds_them_again(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = adapted(bases, kind)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert len(factors) == 8
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in factors.values())
    assert everything == sum(p.numel() for p in model.parameters())  # a byte counts as one, as bitsandbytes' do
    assert len(get_peft_model_state_dict(model)) == 8
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum(".lora_" in key for key in file.keys()) == len(list(file.keys())) == 8
    for low in (False, True):  # with low_cpu_mem_usage PEFT builds layers without data, and fills what it has saved
        again = PeftModel.from_pretrained(
            load_model(bases[kind], packed=kind != "sparse"), str(tmp_path), low_cpu_mem_usage=low
        )
        assert torch.equal(logits(again), logits(model))
        assert not any(p.is_meta for p in again.parameters())
    model.load_state_dict(model.state_dict())
    assert not frozen(model.merge_and_unload())


def test_the_trainer_trains_beside_them_with_checkpointing(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(4, 14)), "labels": list(range(4, 14))}] * 8
    for kind in ("sparse", "quantized"):
        model = adapted(bases, kind)
        before = {name: p.clone() for name, p in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / kind), max_steps=2, per_device_train_batch_size=4, report_to="none",
            gradient_checkpointing=True, use_cpu=True, save_steps=1,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if ".lora_" in name}
        with safe_open(tmp_path / kind / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
            assert len(list(file.keys())) == 8


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("dense", {}), *(("quantized", {"start": start}) for start in STARTS), ("quantized", {"derive_mask": True})],
)
def test_attaching_dequantises_no_weight(
    kind: str, settings: dict[str, Any], bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[torch.Size] = []
    dequantize = QuantizedWeight.dequantize_rows

    def counting(weight: QuantizedWeight, rows: slice) -> torch.Tensor:
        counted.append(weight.shape)
        return dequantize(weight, rows)

    monkeypatch.setattr(QuantizedWeight, "dequantize_rows", counting)
    monkeypatch.setattr("sqft.core.delta.kernels_on", lambda device, dtype: None)
    model = adapted(bases, kind, **settings)
    model.save_pretrained(tmp_path)
    load_model(bases[kind], tmp_path)
    assert not counted
    layer = next(iter(sqft_layers(model).values()))
    assert layer.base_layer.weight.shape == layer.weight_shape
    assert counted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sparse", "quantized"])
def test_two_processes_share_them(kind: str, bases: dict[str, Path]) -> None:
    done = forked.run([kind, str(bases[kind])], 2, Path(__file__).with_name("sharing.py"))
    assert done.returncode == 0, done.stderr[-3000:]
