"""Adapter folders are read whole and refused whole: each damage beside the folder that is right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.plain import beyond_plain
from sqft.adapters.saved import SavedAdapter
from sqft.context import Context
from sqft.errors import InputError
from sqft.recipe import DataConfig, EvaluateConfig, MergeConfig, SearchConfig, VerifyConfig
from sqft.stages import evaluate, extract, merge, verify

MODULE = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{MODULE}.lora_{factor}.weight" for factor in "AB")


@pytest.fixture(scope="module")
def whole(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a plain LoRA of PEFT's own."""
    base, folder = tiny_model("llama"), tmp_path_factory.mktemp("lora")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(base), config).save_pretrained(str(folder))
    return base, folder


def settings(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({name: value for name, value in config.items() if value != "GONE"}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        values = load_file(file)
        change(values)
        save_file({name: tensor.contiguous() for name, tensor in values.items()}, file, metadata={"format": "pt"})

    return apply


def with_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def put(values: dict[str, torch.Tensor]) -> None:
        values[B] = values[B].clone()
        values[B][0, 0] = value

    return put


DAMAGES = {
    "lora_alpha has gone": (settings(lora_alpha="GONE"), "lora_alpha 'nowhere'; it must be a number above 0"),
    "alpha is NaN": (settings(lora_alpha=float("nan")), "lora_alpha nan; it must be"),
    "alpha is text": (settings(lora_alpha="8"), "lora_alpha '8'"),
    "rank 0": (settings(r=0, rank_pattern={}), "r 0; it must be a number above 0"),
    "rank true": (settings(r=True), "r True"),
    "rank of another tensor": (settings(r=3), r"have rank 4, and adapter_config.json says 3"),
    "rank_pattern a list": (settings(rank_pattern=["q_proj"]), "rank_pattern is no mapping"),
    "alpha_pattern 0": (
        settings(alpha_pattern={"q_proj": 0}),
        "alpha_pattern is no mapping of modules to numbers",
    ),
    "another method": (settings(peft_type="IA3"), "its peft_type is 'IA3'"),
    "DoRA": (settings(use_dora=True), "it has use_dora, which is not merged"),
    "aLoRA": (settings(alora_invocation_tokens=[1]), "it has alora_invocation_tokens"),
    "a bias": (settings(bias="all"), "it has bias: all"),
    "a start of its own": (settings(init_lora_weights="olora"), "init_lora_weights: olora, which rewrites the base's"),
    "from the future": (
        settings(use_newlora={"a": 1}),
        "use_newlora is {'a': 1}, which the PEFT installed",
    ),
    "modules not targeted": (settings(target_modules=["v_proj"]), "target_modules does not name .*q_proj"),
    "NaN": (tensors(with_value(float("nan"))), r"q_proj.lora_B has 1 NaN or Inf of 128 values"),
    "Inf": (tensors(with_value(float("inf"))), r"q_proj.lora_B has 1 NaN or Inf"),
    "half of a pair": (tensors(lambda t: t.pop(B)), "q_proj has only lora_A"),
    "no pairs": (tensors(lambda t: t.clear()), "has no LoRA factors"),
    "an extra tensor": (tensors(lambda t: t.update(x=torch.ones(1))), "tensor x is no LoRA factor"),
    "integers": (tensors(lambda t: t.update({A: t[A].int()})), "lora_A is stored as torch.int32"),
    "ranks that differ": (tensors(lambda t: t.update({A: t[A][:2]})), "do not multiply"),
    "a vector": (tensors(lambda t: t.update({A: t[A][0]})), "do not multiply"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 9), "cannot be read"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "settings a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds list, not an object"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.bin, a pickle, which runs code",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused(name: str, whole: tuple[Path, Path], tmp_path: Path) -> None:
    assert len(SavedAdapter.open(whole[1]).modules) == 4
    change, message = DAMAGES[name]
    shutil.copytree(whole[1], tmp_path / "x")
    change(tmp_path / "x")
    with pytest.raises(InputError, match=message):
        SavedAdapter.open(tmp_path / "x")


def test_every_stage_refuses_it_alike_and_makes_nothing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = whole
    shutil.copytree(folder, tmp_path / "x")
    tensors(with_value(float("nan")))(tmp_path / "x")
    out, adapter, data = tmp_path / "out", tmp_path / "x", DataConfig(task="piqa")
    for attempt in (
        lambda: merge.run(MergeConfig(), base, adapter, out, Context()),
        lambda: verify.run(VerifyConfig(), base, base, adapter, out, Context()),
        lambda: extract.run(SearchConfig(), adapter, out, Context()),
        lambda: evaluate.run(EvaluateConfig(), data, base, adapter, out, Context()),
        lambda: load_model(base, adapter),
    ):
        with pytest.raises(InputError, match="has 1 NaN or Inf"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_modules_and_tensors_must_be_the_same(whole: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = whole
    shutil.copytree(folder, tmp_path / "x")
    tensors(lambda t: (t.pop(A), t.pop(B)))(tmp_path / "x")
    for attempt in (
        lambda: merge.run(MergeConfig(), base, tmp_path / "x", tmp_path / "out", Context()),
        lambda: load_model(base, tmp_path / "x"),
    ):
        with pytest.raises(InputError, match=rf"its settings adapt {MODULE}, of which it has no tensors"):
            attempt()


def test_what_a_trainer_saved_of_an_elastic_adapter_is_its_rank_space(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for kind in ("sparse", "dense"):
        config = SqftConfig(kind=kind, ranks=[8, 6, 4], lora_alpha=16, target_modules=["q_proj", "k_proj", "up_proj"])
        get_peft_model(load_model(tiny_model("llama")), config).save_pretrained(str(tmp_path / kind))
        space = SavedAdapter.open(tmp_path / kind).rank_space()
        assert space.choices == (8, 6, 4)
        shared = space.groups["model.layers.1.self_attn.q_proj+k_proj+v_proj"]
        assert set(shared) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}
    # A record of ours that was cut is refused, not guessed.
    record = tmp_path / "sparse" / "adapter_config.json"
    whole = json.loads(record.read_text())
    for name in ("kind", "start"):
        record.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(InputError, match=f"has no {name}"):
            SavedAdapter.open(tmp_path / "sparse")
    # Stock PEFT reads the dense one as plain LoRA of the largest rank.
    assert json.loads((tmp_path / "dense" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "ranks" not in json.loads((tmp_path / "dense" / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "beyond"),
    [
        ({}, []),
        ({"use_rslora": True, "lora_dropout": 0.5, "init_lora_weights": "orthogonal"}, []),
        ({"use_dora": True}, ["use_dora"]),
        ({"lora_bias": True}, ["lora_bias (parameters lora_B.probe.bias)"]),
        ({"init_lora_weights": "mica"}, ["init_lora_weights: mica, which rewrites the base's weights"]),
    ],
)
def test_plain_lora_is_found_out_by_a_probe(options: dict[str, Any], beyond: list[str]) -> None:
    before = torch.random.get_rng_state()
    assert beyond_plain(LoraConfig(**options)) == beyond
    assert torch.equal(before, torch.random.get_rng_state())
