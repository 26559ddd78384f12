"""verify reads models block by block, and says what it says of models that are in memory whole."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.context import Context
from sqft.data.tasks import Example, Task
from sqft.model import blockwise
from sqft.model.blockwise import BlockwiseModel, NotBlockwise
from sqft.recipe import MergeConfig, QuantizeConfig, SparsifyConfig, VerifyConfig
from sqft.stages import merge, quantize, sparsify, verify
from sqft.stages.verify import behaviour
from sqft.storage.checkpoint import Checkpoint

ROWS = [Example(f"{a} + {a} =", f" {2 * a}") for a in range(6)]
CASES: dict[str, dict[str, Any]] = {
    "sparse": {"base": "sparse", "kind": "sparse"},
    "sparse, Conv1D": {"base": "sparse", "kind": "sparse", "arch": "gpt2", "targets": ["c_attn", "c_fc"]},
    "INT4": {"base": "int4", "kind": "quantized"},
    "INT4 as GPTQ": {"base": "int4", "kind": "quantized", "format": "gptq", "symmetric": True},
    "dense": {"base": "dense", "kind": "dense"},
    "dense, float32": {"base": "dense", "kind": "dense", "dtype": "float32"},
    "dense on INT4": {"base": "int4", "kind": "dense"},
}


@pytest.fixture
def made(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Make base, adapter and merged model of a case; return the folder that holds them."""

    def make(
        base: str,
        kind: str,
        arch: str = "llama",
        dtype: str = "bfloat16",
        targets: tuple[str, ...] = ("q_proj", "down_proj"),
        **settings: Any,
    ) -> Path:
        model = tiny_model(arch, dtype, num_hidden_layers=3) if arch == "llama" else tiny_model(arch, dtype)
        if base == "sparse":
            sparsify.run(SparsifyConfig(method="magnitude"), model, None, tmp_path / "base", Context())
        elif base == "int4":
            config = QuantizeConfig(method="rtn", group_size=16, **settings)
            joint = SparsifyConfig(method="magnitude")
            quantize.run(config, model, None, tmp_path / "base", Context(), sparsify=joint)
        else:
            (tmp_path / "base").symlink_to(model)
        torch.manual_seed(0)
        own = SqftConfig(kind=kind, r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
        adapted = get_peft_model(load_model(tmp_path / "base", packed=True), own)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(str(tmp_path / "adapter"))
        lossy = MergeConfig(allow_precision_loss=True, allow_sparsity_loss=True)
        merge.run(lossy, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", Context())
        return tmp_path

    return make


def prove(at: Path, file: str, **options: Any) -> dict[str, Any]:
    settings = VerifyConfig(prompts=3, **options)
    return verify.run(settings, at / "merged", at / "base", at / "adapter", at / file, Context())


@pytest.mark.parametrize("case", CASES)
def test_the_proof_is_that_of_whole_models(
    case: str, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = made(**CASES[case])
    with monkeypatch.context() as patch:
        patch.setattr(behaviour, "load_model", lambda *_args, **_options: pytest.fail("a model was opened whole"))
        found = prove(at, "blocks.json")["checks"]

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise NotBlockwise("so that it is held whole")

    monkeypatch.setattr(behaviour, "BlockwiseModel", refuse)
    assert found == prove(at, "whole.json")["checks"]
    passed = {check["name"]: check["passed"] for check in found}
    assert all(passed.values()) == (case != "dense on INT4"), found


def test_a_changed_block_is_seen(made: Callable[..., Path]) -> None:
    at = made(**CASES["sparse"])
    checkpoint = Checkpoint(at / "merged")
    name = "model.layers.2.mlp.gate_proj.weight"
    checkpoint.write(name, checkpoint.read(name) * 1.5)
    (at / "merged" / "sqft" / "manifest.json").unlink()
    failed = {check["name"] for check in prove(at, "verify.json")["checks"] if not check["passed"]}
    assert failed == {"rest_untouched", "logits_equal"}


def test_each_side_has_one_block_in_memory(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    at = made(**CASES["INT4"])
    opened: list[str] = []
    held: set[str] = set()
    original = BlockwiseModel._opened

    @blockwise.contextmanager
    def noted(self: BlockwiseModel, name: str) -> Any:
        with original(self, name) as part:
            held.add(f"{id(self)} {name}")
            assert len(held) == 1 or name == "lm_head", held
            opened.append(name)
            yield part
            held.clear()
        assert all(tensor.is_meta for tensor in part.parameters()), "what was dropped has no weights"

    monkeypatch.setattr(BlockwiseModel, "_opened", noted)
    assert prove(at, "verify.json")["passed"]
    blocks = [f"model.layers.{index}" for index in range(3)]
    assert opened == [*blocks, *blocks, "lm_head", "lm_head"]


def test_generated_answers_take_whole_models_and_may_be_left_out(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = made(**CASES["sparse"])
    sides = at / "merged", at / "base", at / "adapter"
    task = Task("sums", "exact")

    def names(rows: int, file: str) -> list[str]:
        config = VerifyConfig(prompts=3, accuracy_rows=rows)
        result = verify.run(config, *sides, at / file, Context(), task=task, examples=ROWS)
        assert result["passed"]
        return [check["name"] for check in result["checks"]]

    with monkeypatch.context() as patch:
        patch.setattr(behaviour, "load_model", lambda *_args, **_options: pytest.fail("a model was opened whole"))
        without = names(0, "without.json")
    monkeypatch.setattr(behaviour, "BlockwiseModel", lambda *_args, **_options: pytest.fail("read twice"))
    assert names(4, "with.json") == [*without, "accuracy_equal"]


def test_what_cannot_be_run_block_by_block_is_held_whole(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at = made(**CASES["sparse"])
    monkeypatch.setattr(blockwise, "_ends", lambda *_: (_ for _ in ()).throw(NotBlockwise("its blocks share weights")))
    with caplog.at_level(logging.INFO):
        assert prove(at, "verify.json")["passed"]
    assert "is held whole: its blocks share weights" in caplog.text
