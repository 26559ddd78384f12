"""finetune with a teacher: what is trained, kept, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sqft
from sqft import cli
from sqft.adapters.attach import load_model
from sqft.artifact import Artifact
from sqft.context import Context
from sqft.core.bfloat16 import multiplies_bfloat16
from sqft.errors import InputError
from sqft.model.opening import load_tokenizer
from sqft.recipe import FinetuneConfig
from sqft.stages import finetune
from sqft.stages.finetune import loop
from sqft.training.attention import NAME
from sqft.training.batches import collate
from sqft.training.loss import answer_loss

PAIRS = [(f"Question: {a} + {b}?\nAnswer:", f" {a + b}") for a in range(6) for b in range(6)]
DISTILL = {"hidden": 1.0, "logits": 0.5}


def training(**options: Any) -> FinetuneConfig:
    values = {
        "ranks": [4, 2], "lora_alpha": 8, "max_steps": 6, "length": 128, "batch": 2, "learning_rate": 0.02,
        "save_every": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], "distill": DISTILL, **options,
    }  # fmt: skip
    return FinetuneConfig.model_validate(values)


@pytest.fixture(scope="module")
def bases(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The dense model, and what was compressed from it: sparse, or sparse INT4."""
    made = {"dense": tiny_model("llama", "float32")}

    def base(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("base") / name
            if name == "sparse":
                sqft.sparsify(base("dense"), out, method="magnitude")
            else:
                sqft.quantize(base("sparse"), out, method="rtn", group_size=16)
            made[name] = out
        return made[name]

    return base


def train(
    out: Path, base: Path, teacher: Path | None, held_out: list[tuple[str, str]] | None = None, **options: Any
) -> Artifact:
    return finetune.run(training(**options), base, PAIRS, held_out or [], out, Context(), data={}, teacher=teacher)


def weights(adapter: Artifact) -> dict[str, torch.Tensor]:
    return load_file(adapter.path / "adapter_model.safetensors")


def log_of(adapter: Artifact) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((adapter.path / "sqft" / "training_log.json").read_text())
    return log


@pytest.mark.parametrize(("kind", "name"), [("sparse", "sparse"), ("quantized", "int4"), ("dense", "sparse")])
def test_the_loss_is_the_weighted_sum_of_the_parts_that_the_log_has(
    kind: str, name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    made = train(tmp_path / "adapter", bases(name), bases("dense"), kind=kind, start="dequantized")
    steps = log_of(made)["train"]
    assert len(steps) == 6
    for step in steps:
        assert step["loss"] == pytest.approx(step["task_loss"] + step["hidden"] + 0.5 * step["logits"], rel=1e-3)
        assert min(step["hidden"], step["logits"]) > 0
    assert Artifact.open(made.path).manifest["result"]["final_loss"] == steps[-1]["loss"]
    assert all(".lora_" in name for name in weights(made))
    alone = train(tmp_path / "alone", bases(name), None, kind=kind, start="dequantized", distill=None)
    assert steps[0]["task_loss"] == pytest.approx(log_of(alone)["train"][0]["loss"], rel=1e-4)
    assert set(log_of(alone)["train"][0]) == {"step", "loss", "learning_rate"}
    assert "distill" not in alone.manifest["config"]  # folders made before there was any keep their keys
    assert set(alone.manifest["inputs"]) == {"model"}
    assert not all(torch.equal(value, weights(alone)[name]) for name, value in weights(made).items())


def test_validation_is_of_the_task_alone(bases: Callable[[str], Path], tmp_path: Path) -> None:
    far = {"hidden": 50.0, "logits": 50.0}
    made = train(tmp_path / "a", bases("sparse"), bases("dense"), PAIRS[:4], evaluate_every=6, distill=far)
    model, tokenizer = load_model(bases("sparse"), made.path), load_tokenizer(bases("sparse"))
    rows = finetune.label(training(), tokenizer, PAIRS[:4], model.config)
    batches = [
        collate([{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows[at : at + 2]], 0) for at in (0, 2)
    ]
    with torch.no_grad():
        wanted = [float(answer_loss(model, batch)) for batch in batches]
    (found,) = log_of(made)["eval"]
    assert found["eval_loss"] == pytest.approx(sum(wanted) / 2, rel=1e-4)
    first, *_, last = log_of(made)["train"]
    assert last["loss"] > 2 * found["eval_loss"]
    assert all(last[part] < 0.9 * first[part] for part in ("hidden", "logits"))


def test_accumulated_recomputed_and_long_rows_train_alike(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folders, common = (bases("sparse"), bases("dense")), {"packing": False, "max_steps": 3}
    made = train(tmp_path / "plain", *folders, batch=4, **common)
    for name, options in {
        "recomputed": {"gradient_checkpointing": True, "batch": 4},
        "accumulated": {"accumulation": 2, "batch": 2},
        "by_example": {"length": 257, "batch": 4},
    }.items():
        other = train(tmp_path / name, *folders, **common, **options)
        for one, two in zip(log_of(made)["train"], log_of(other)["train"], strict=True):
            assert one == pytest.approx(two, rel=2e-3), name
        assert all(torch.allclose(value, weights(other)[key], atol=2e-3) for key, value in weights(made).items()), name


def test_interrupted_it_ends_with_the_same_bits_and_keeps_no_teacher(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = bases("sparse"), bases("dense")
    whole = train(tmp_path / "whole", *folders)

    def interrupt(_self: object, args: Any, state: Any, *_: object, **__: object) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Log, "on_log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "again", *folders)
    checkpoint = tmp_path / ".partial-again" / ".checkpoints" / "checkpoint-4"
    assert load_file(checkpoint / "adapter_model.safetensors").keys() == weights(whole).keys()
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(weights(whole))
    again = train(tmp_path / "again", *folders)
    assert again.manifest["result"]["resumed_at_step"] == 4
    name = "adapter_model.safetensors"
    assert again.manifest["files"][name] == whole.manifest["files"][name]
    assert log_of(again) == log_of(whole)


def test_the_teacher_is_frozen_as_it_is_stored_and_attends_as_the_student(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    train_it = loop.PackedTrainer.train

    def watched(trainer: Any, *args: Any, **options: Any) -> Any:
        done = train_it(trainer, *args, **options)
        seen.append((trainer.distillation.teacher, trainer.model))
        return done

    monkeypatch.setattr(loop.PackedTrainer, "train", watched)
    teacher = tiny_model("llama", "bfloat16")
    train(tmp_path / "adapter", tiny_model("llama", "float32"), teacher, max_steps=1, length=300, kind="dense")
    ((used, student),) = seen
    assert not used.training
    assert student.training
    assert not any(p.requires_grad or p.grad is not None for p in used.parameters())
    computes = torch.bfloat16 if multiplies_bfloat16() or torch.cuda.is_available() else torch.float32
    assert {p.dtype for p in used.parameters()} == {computes}
    stored = load_model(teacher).state_dict()
    assert all(torch.equal(value.cpu(), stored[name].to(computes)) for name, value in used.state_dict().items())
    attention = {model.config._attn_implementation for model in (used, student.get_base_model())}
    assert attention == ({NAME} if not torch.cuda.is_available() else {"sdpa"})


def test_the_teachers_bytes_are_an_input(bases: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"max_steps": 1}
    made = train(tmp_path / "adapter", bases("sparse"), bases("dense"), **options)
    assert made.manifest["inputs"]["teacher"]["digest"] != made.manifest["inputs"]["model"]["digest"]
    assert made.manifest["config"]["distill"] == DISTILL
    again = train(tmp_path / "adapter", bases("sparse"), bases("dense"), **options)
    assert again.manifest == made.manifest
    with pytest.raises(InputError, match=r"its input teacher .* has changed"):
        train(tmp_path / "adapter", bases("sparse"), bases("sparse"), **options)
    with pytest.raises(InputError, match=r"distill\.hidden was 1\.0, is now 2\.0|distill was"):
        train(tmp_path / "adapter", bases("sparse"), bases("dense"), distill={"hidden": 2, "logits": 0.5}, **options)


def test_a_teacher_that_does_not_fit_is_refused_before_work(
    bases: Callable[[str], Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 272}
    with pytest.raises(InputError, match=r"does not fit .*3 problems") as error:
        train(tmp_path / "adapter", bases("sparse"), tiny_model("llama", **sizes))
    for said in (
        "3 blocks, the model 2",
        "16 hidden units, the model 32",
        "272 tokens in its vocabulary, the model 264",
    ):
        assert f"has {said}" in str(error.value)
    other = tmp_path / "other"
    load_model(bases("dense")).save_pretrained(other)
    tokenizer = load_tokenizer(bases("dense"))
    tokenizer.add_tokens(["forty-two"])
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="its tokenizer differs in 1 tokens, 'forty-two' among them"):
        train(tmp_path / "adapter", bases("sparse"), other)
    with pytest.raises(InputError, match=r"distill needs a teacher; give the uncompressed model's folder, --teacher"):
        train(tmp_path / "adapter", bases("sparse"), None)
    with pytest.raises(InputError, match=r"teacher \S+ would do nothing without distill; add --distill\.hidden 1"):
        train(tmp_path / "adapter", bases("sparse"), bases("dense"), distill=None)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_command_and_function_take_the_teacher(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in PAIRS))
    out, given = tmp_path / "adapter", {"kind": "sparse", "ranks": [4], "max_steps": 1, "length": 64, "batch": 2}
    flags = ["--task", str(data), "--kind", "sparse", "--ranks", "4", "--max-steps", "1", "--length", "64"]
    command = ["finetune", str(bases("sparse")), str(out), *flags, "--batch", "2", "--distill.hidden", "1"]
    assert cli.run(command) == 2
    assert "distill needs a teacher" in capsys.readouterr().err
    assert not out.exists()
    assert cli.run([*command, "--teacher", str(bases("dense"))]) == 0
    options: Any = {**given, "distill": {"hidden": 1}}
    made = sqft.finetune(bases("sparse"), out, data=str(data), teacher=bases("dense"), **options)
    assert set(log_of(made)["train"][0]) >= {"task_loss", "hidden", "logits"}
    with pytest.raises(InputError, match="distill needs a teacher"):
        sqft.finetune(bases("sparse"), out, data="nowhere", **options)
