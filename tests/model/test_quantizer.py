"""Packed bases through `from_pretrained`: one line of a user's own code, as transformers opens any other model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import forked
from sqft import packed_config
from sqft.context import Context
from sqft.errors import InputError
from sqft.model.load import open_model
from sqft.model.packed import PackedLinear
from sqft.recipe import QuantizeConfig
from sqft.stages import quantize
from sqft.storage.integers import PackedCheckpoint

PROMPT = torch.arange(40).view(2, 20)
BYTES = {"packed", "scale_bytes", "zero_point"}
BOTH = pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])


@pytest.fixture
def base(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`base(arch, form, dtype)`: a quantised folder."""

    def make(arch: str = "llama", form: str = "compressed-tensors", dtype: str = "bfloat16", **settings: Any) -> Path:
        config = QuantizeConfig.model_validate({"format": form, "method": "rtn", "group_size": 16, **settings})
        quantize.run(
            config, tiny_model(arch, dtype), torch.zeros(1, 8).long(), tmp_path / arch, Context(), sparsify=None
        )
        return tmp_path / arch

    return make


def opened(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=packed_config(folder), **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=PROMPT).logits
    return found


def linears(model: torch.nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@BOTH
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "gemma", "opt", "gemma3"])
def test_every_weight_is_what_the_folder_holds(arch: str, form: str, base: Callable[..., Path]) -> None:
    folder = base(arch, form)
    stored, model = PackedCheckpoint(folder), opened(folder)
    found = linears(model)
    assert len(found) == len(stored.shapes)
    assert not model.training
    for name, linear in found.items():
        weight = next(w for w in stored.shapes if f"{name}.weight".endswith(w.removeprefix("language_model.")))
        codes, grid = stored.read(weight)
        assert torch.equal(linear.weight, grid.dequantize(codes, torch.bfloat16))
        assert linear.folder == folder
    assert torch.equal(logits(model), logits(open_model(folder, packed=True)))


def test_the_one_line_in_a_fresh_process_and_nothing_is_patched(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
assert "sqft" not in sys.modules
import sqft
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, config=sqft.packed_config({str(folder)!r}))
packed = {{type(m).__name__ for m in model.modules()}}
plain = AutoModelForCausalLM.from_pretrained({str(folder)!r})
assert "PackedLinear" in packed and "PackedLinear" not in {{type(m).__name__ for m in plain.modules()}}
torch.save(model(input_ids=torch.arange(40).view(2, 20)).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(open_model(folder, packed=True)))


@BOTH
@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps_and_the_parameters(place: Any, form: str, base: Callable[..., Path]) -> None:
    folder = base("llama", form)
    model = opened(folder, device_map=place, low_cpu_mem_usage=True)
    assert torch.equal(logits(model).cpu(), logits(open_model(folder, packed=True)))
    for linear in linears(model).values():
        assert {name for name, _ in linear.named_parameters()} == BYTES
        assert not list(linear.buffers())
        assert all(p.dtype == torch.uint8 and not p.requires_grad for p in linear.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_shards_are_opened(base: Callable[..., Path]) -> None:
    folder = base("phi3")
    whole = logits(opened(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}  # a linear's tensors lie apart
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(opened(folder)), whole)


def test_embeddings_stored_twice_with_two_contents_are_not_tied(base: Callable[..., Path]) -> None:
    folder = base()
    before = logits(opened(folder))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    assert torch.equal(logits(opened(folder)), before)
    tied = opened(base("gemma"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_leaves_codes_and_scales_alone(dtype: torch.dtype, base: Callable[..., Path]) -> None:
    model = opened(base())
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    weights = {name: linear.weight for name, linear in linears(model).items()}
    model.half() if dtype == torch.float16 else model.float()
    model.to(dtype)
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(torch.equal(linear.weight, weights[name]) for name, linear in linears(model).items())
    assert logits(model).dtype == dtype
    assert logits(model).isfinite().all()


def test_the_dtype_that_is_asked_for_is_what_weights_are_dequantised_to(base: Callable[..., Path]) -> None:
    model = opened(base(), dtype=torch.float32)
    assert {linear.weight.dtype for linear in linears(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.float32


def test_a_parameter_that_is_renamed_gets_the_models_dtype(base: Callable[..., Path]) -> None:
    name = "model.layers.0.input_layernorm.weight"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name.removeprefix("model.")] = tensors.pop(name).float()

    model = opened(changed(base(), rename))
    assert model.get_parameter(name).dtype == torch.bfloat16


def test_stock_trainers_get_an_optimiser_without_codes(base: Callable[..., Path], tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from sqft import SqftConfig

    model = get_peft_model(opened(base()), SqftConfig(kind="dense", r=4, target_modules=["q_proj"]))
    arguments = TrainingArguments(str(tmp_path / "t"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert trainer.optimizer is not None
    given = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())


def test_gradients_reach_the_embeddings_under_checkpointing(base: Callable[..., Path]) -> None:
    """transformers calls quantised models so, and PEFT then leaves the inputs without gradient."""
    from peft import get_peft_model

    from sqft import SqftConfig

    model = opened(base())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    adapted: Any = get_peft_model(model, SqftConfig(kind="dense", r=4, target_modules=["q_proj"])).train()
    adapted(input_ids=PROMPT, labels=PROMPT).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)


def test_saving_from_memory_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not saved from memory"):
        opened(base()).save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_a_float_folder_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="is not quantised; open it with from_pretrained alone"):
        packed_config(tiny_model())


def test_folders_that_lack_something_are_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base("qwen2")

    def refused(change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "damaged")
        with pytest.raises(InputError, match=message):
            open_model(changed(tmp_path / "damaged", change), packed=True)

    block = "model.layers.1"
    q_proj, norm = f"{block}.self_attn.q_proj", f"{block}.input_layernorm.weight"
    refused(lambda t: t.pop(norm), rf"lacks {norm}, or has them in another shape")
    refused(lambda t: t.update({norm: torch.ones(31)}), rf"lacks {norm}, or has them in another shape")
    refused(lambda t: t.pop(f"{q_proj}.bias"), rf"lacks {q_proj}\.bias, or has")
    refused(lambda t: t.pop(f"{q_proj}.weight_scale"), rf"{q_proj} has no weight_scale")
    names = [f"{q_proj}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")]
    refused(lambda t: [t.pop(name) for name in names], rf"lacks {q_proj}\.weight, or has")
    stray = {name.replace("layers.1", "layers.7"): name for name in names}
    refused(
        lambda t: t.update({new: t[old].clone() for new, old in stray.items()}),
        r"layers\.7\.self_attn\.q_proj\.weight is quantised, but the model has no linear model\.layers\.7",
    )


@pytest.mark.slow
def test_two_processes_share_a_packed_model(base: Callable[..., Path]) -> None:
    """DDP broadcasts the bytes, FSDP2 shards them: logits and gradients are those of one process, to the bit."""
    done = forked.run([str(base())], 2, Path(__file__).with_name("sharing.py"))
    assert done.returncode == 0, done.stderr
