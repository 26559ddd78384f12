"""What is exported to OpenVINO is proved, what cannot be is refused before any work; with a stand-in for both tools."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sqft
from sqft import cli
from sqft.context import Context
from sqft.errors import InputError
from sqft.recipe import QuantizeConfig
from sqft.stages import quantize
from sqft.stages.export import intel
from sqft.stages.export.intel_hook import read
from sqft.stages.export.to_openvino import compare
from sqft.storage.integers import PackedCheckpoint

EXPORTER = Path(__file__).parent / "openvino"


def int4(model: Path, out: Path, **settings: Any) -> Path:
    values = {"method": "rtn", "group_size": 16, **settings}
    quantize.run(QuantizeConfig(**values), model, None, out, Context())
    return out


def nothing_but(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


@pytest.fixture
def model(tiny_model: Any, tmp_path: Path) -> Path:
    return int4(tiny_model("llama", "bfloat16"), tmp_path / "int4")


def test_the_command_says_what_was_proved(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(model), str(tmp_path / "ir"), "--format", "openvino", "--converter", str(EXPORTER)]
    assert cli.run([*command, "--proof", str(tmp_path / "proof.json")]) == 0
    said = capsys.readouterr().out
    assert "14 linears, 18,432 weights, read back and equal to the bit\nu4, 6.25 bits a weight, " in said
    assert "logits of 96 tokens differ from transformers' in float32 by at most " in said
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert (proof["constants"], proof["floats"], proof["computed"]) == (42, 7, 0)
    assert proof["logits"] < 1e-4
    assert nothing_but(tmp_path, "int4", "ir", "proof.json")
    assert cli.run(command) == 2
    assert "ir already exists" in capsys.readouterr().err


def test_what_computes_otherwise_leaves_no_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORTER_FAULT", "computes")
    with pytest.raises(InputError, match=r"a logit differs by 0\.01 from transformers' \(at most 0\.001\)"):
        sqft.export(model, tmp_path / "ir", format="openvino", converter=EXPORTER)
    assert nothing_but(tmp_path, "int4")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", None),
        ("codes", r"not the model .*: model\.layers\.\S+\.weight: its codes are not the folder's"),
        ("scales", r"not the model .*: model\.layers\.\S+\.weight: its scales are not the folder's"),
        ("zeros", r"not the model .*: model\.layers\.\S+\.weight: its zeros are not the folder's"),
        ("drops", r"model\.layers\.\S+\.weight is not in it as 4-bit constants"),
    ],
)
def test_a_wrong_constant_is_found_by_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str | None
) -> None:
    monkeypatch.syspath_prepend(str(EXPORTER))
    monkeypatch.setenv("EXPORTER_FAULT", fault)
    try:
        export = importlib.import_module("optimum.exporters.openvino").main_export
        config = SimpleNamespace(dtype="fp32")
        export(model, tmp_path / "ir", "text-generation-with-past", config, convert_tokenizer=False)
        found = read(str(tmp_path / "ir" / "openvino_model.xml"))
    finally:  # the stand-ins are none of other tests' modules
        for name in [name for name in sys.modules if name.split(".")[0] in ("openvino", "optimum")]:
            del sys.modules[name]
    with pytest.raises(InputError, match=f"(?s){said}") if said else nullcontext():
        compare(found, PackedCheckpoint(model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 8}, "has weights of 8 bits; .* with bits: 4"),
        ({"format": "gptq", "group_size": 32}, "is stored as gptq, .* with format: compressed-tensors"),
        ({"group_size": None}, "scales are those of whole rows; .* with group_size: 64"),
    ],
)
def test_a_grid_that_openvino_rounds_is_refused_with_the_setting(
    tiny_model: Any, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    model = int4(tiny_model("llama", "bfloat16"), tmp_path / "int4", **settings)
    with pytest.raises(InputError, match=f"(?s){said}"):
        sqft.export(model, tmp_path / "ir", format="openvino", converter=EXPORTER)
    assert nothing_but(tmp_path, "int4")


def test_all_problems_are_given_at_once_and_nothing_is_installed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    with pytest.raises(InputError) as stop:
        sqft.export(model, tmp_path / "m.gguf", format="openvino", converter=EXPORTER)
    assert all(word in str(stop.value) for word in ("2 problems", "ends in .gguf", "'nobodys', which optimum-intel"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sqft.stages.export.to_openvino.install", lambda: pytest.fail("installs"))
    with pytest.raises(InputError, match="already exists"):
        sqft.export(model, model, format="openvino")


def test_a_float_model_an_adapter_and_another_format_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a float model, .*optimum-cli export openvino.*sqft quantize"):
        sqft.export(tiny_model("llama"), tmp_path / "ir", format="openvino", converter=EXPORTER)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is an adapter, not a model; .*sqft merge BASE ADAPTER MERGED"):
        sqft.export(tmp_path / "adapter", tmp_path / "ir", format="openvino", converter=EXPORTER)
    with pytest.raises(InputError, match="formats are gguf, openvino"):
        sqft.export(tmp_path, tmp_path / "ir", format="onnx")  # type: ignore[arg-type]


def test_a_name_without_an_end_is_told_of_the_other_format(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ir does not end in \.gguf; .*--format openvino"):
        sqft.export(model, tmp_path / "ir", converter=Path(__file__).parent / "converter")


def test_pip_s_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(intel, "REQUIREMENTS", (str(tmp_path / "no-such-package"),))
    with pytest.raises(InputError, match=r"optimum-intel could not be installed\n.*ERROR"):
        intel.install()
    assert intel.given(None) is None
    with pytest.raises(InputError, match=r"--converter .*: is neither a folder into which pip put optimum-intel"):
        intel.given(tmp_path)
