"""A folder whose tensors contradict its config is refused, with names and numbers, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sqft.errors import InputError
from sqft.model.load import open_model
from sqft.model.targets import decoder_blocks, skeleton
from sqft.model.whole import check_whole
from sqft.storage.checkpoint import Checkpoint


@pytest.fixture
def damaged(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`damaged(change, **config)`: a copy of the tiny llama with changed tensors and settings."""

    def make(change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None, **config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **config}))
        return folder

    return make


def check(folder: Path) -> None:
    check_whole(skeleton(folder), Checkpoint(folder))


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen2_moe", "gpt2", "gemma", "dbrx", "deepseek_v3", "gemma3"])
def test_whole_folders_pass(arch: str, tiny_model: Callable[..., Path]) -> None:
    check(tiny_model(arch))


def test_more_blocks_than_the_config_names_are_refused(damaged: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"more blocks than its config\.json names \(1\): model\.layers\.1\."):
        check(damaged(num_hidden_layers=1))


def test_blocks_that_transformers_leaves_on_purpose_pass(
    damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = skeleton(damaged(num_hidden_layers=1))
    monkeypatch.setattr(network, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1\..*"])
    check_whole(network, Checkpoint(network.config._name_or_path))


def test_fewer_blocks_than_the_config_names_are_refused(damaged: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"lacks model\.layers\.2\.\S+, .* and 13 more"):
        check(damaged(num_hidden_layers=4))


@pytest.mark.parametrize("opener", [skeleton, open_model])
def test_more_blocks_than_tensors_are_refused_before_they_are_built(
    opener: Callable[[Path], Any], damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", lambda self, config, index: built.append(index))
    with pytest.raises(InputError, match=r"says num_hidden_layers 1000000000, and the folder has 21 tensors in all"):
        opener(damaged(num_hidden_layers=10**9))
    assert not built


def test_blocks_of_an_inner_config_are_counted_too(damaged: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"says text_config\.num_hidden_layers 22, and the folder has 21 tensors"):
        skeleton(damaged(text_config={"num_hidden_layers": 22}))


def test_no_blocks_are_refused(damaged: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="has 0 decoder blocks"):
        decoder_blocks(skeleton(damaged(num_hidden_layers=0)))


@pytest.mark.parametrize("settings", [{"num_attention_heads": 0}, {"hidden_size": -32}, {"num_hidden_layers": "two"}])
def test_a_config_that_makes_no_model_is_refused(settings: dict[str, Any], damaged: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="config"):
        skeleton(damaged(**settings))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, damaged: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    with pytest.raises(InputError, match=rf"no floats: {name} \({str(dtype).removeprefix('torch.')}\)"):
        check(damaged(change))


def test_another_shape_and_a_missing_weight_are_refused_together(damaged: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()
        del tensors["model.layers.1.mlp.down_proj.weight"]

    with pytest.raises(
        InputError, match=rf"2 problems(?s:.*)lacks \S+down_proj(?s:.*){name} \[15, 32\], not \[16, 32\]"
    ):
        check(damaged(change))
