"""Several processes on one training: the same adapter as one process makes, and nothing written twice."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import forked
from sqft.artifact import Artifact
from sqft.errors import InputError
from sqft.recipe import FinetuneConfig
from sqft.stages import finetune

# Nothing after the training: test_an_int4_run_goes_on_alone_after_its_training has the rest.
TRAINING = [part for setting in ("merge=null", "verify=null", "evaluate=null") for part in ("--set", setting)]
ROWS = [{"prompt": f"Question: {a} + {b}?\nAnswer:", "completion": f" {a + b}"} for a in range(6) for b in range(6)]


@pytest.fixture(scope="module")
def recipe(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shared")
    data = place / "data"
    data.mkdir()
    for split, rows in {"train": ROWS[:24], "validation": ROWS[24:30], "test": ROWS[30:]}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "name": "shared",
        "model": str(tiny_model("llama", "float32")),
        "threads": 1,
        "data": {"task": str(data)},
        "sparsify": {"calibration": {"samples": 4, "length": 32}},
        "finetune": {
            "kind": "sparse", "ranks": [4, 2], "lora_alpha": 8, "max_steps": 6, "length": 128, "batch": 2,
            "accumulation": 2, "learning_rate": 0.02, "save_every": 2, "evaluate_every": 3,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "packing": False,  # 24 rows, six steps of four: with a rest, the last step would be filled up
        },
        "verify": {"prompts": 2, "accuracy_rows": 2},
    }  # fmt: skip
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run(recipe: Path, out: Path, *more: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return forked.run(["run", str(recipe), "--out", str(out), *more], processes)


def by_torchrun(recipe: Path, out: Path, *more: str, processes: int) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*launch, "-m", "sqft", "run", str(recipe), "--out", str(out), *more]
    # No GPU may be used: a machine may have fewer than the processes.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process."""
    done = run(recipe, recipe.parent / "one", *TRAINING)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "one"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_a_step(recipe: Path, alone: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "many"
    shared = (by_torchrun if processes == 2 else run)(recipe, out, *TRAINING, processes=processes)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("report:") == 1
    one, many = adapter(alone), adapter(out)
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert torch.allclose(value, many[name], atol=1e-4), name
    logs = [json.loads((place / "adapter" / "sqft" / "training_log.json").read_text()) for place in (alone, out)]
    for kind, key in (("train", "loss"), ("eval", "eval_loss")):
        losses = [[entry[key] for entry in log[kind]] for log in logs]
        assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    # The same key: a run that began with several processes goes on with one.
    keys = [Artifact.open(place / "adapter").manifest["key"] for place in (alone, out)]
    assert keys[0] == keys[1]
    if processes == 2:
        again = run(recipe, out, *TRAINING)
        assert again.returncode == 0, again.stderr
        assert "step " not in again.stderr  # the training is there


def test_an_int4_run_goes_on_alone_after_its_training(recipe: Path, tmp_path: Path) -> None:
    """compressed-tensors and lm-eval share work with a process group that they find, and would wait for the others."""
    settings = ["quantize.group_size=16", "finetune.kind=quantized", "quantize.calibration.samples=4"]
    sets = [part for setting in settings for part in ("--set", setting)]
    shared = run(recipe, tmp_path / "int4", *sets, "--set", "quantize.calibration.length=32", processes=2)
    assert shared.returncode == 0, shared.stderr
    assert json.loads((tmp_path / "int4" / "verify.json").read_text())["passed"]
    assert (tmp_path / "int4" / "evaluations" / "merged.json").is_file()


@pytest.mark.parametrize("after", ["{kind: sparse, ranks: [4], max_steps: 2, length: 128, batch: 2}", "null"])
def test_processes_share_the_teachers_training_and_wait_for_the_base(recipe: Path, tmp_path: Path, after: str) -> None:
    teacher = "teacher={ranks: [4], max_steps: 2, length: 128, batch: 2, accumulation: 2, packing: false}"
    out, settings = tmp_path / "taught", ["--set", teacher, "--set", f"finetune={after}", "--set", "evaluate=null"]
    shared = run(recipe, out, *settings, processes=2)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("report:") == 1
    made = {path.name for path in out.iterdir() if path.is_dir()}
    tuned = set() if after == "null" else {"adapter", "sub_adapter", "merged"}
    assert made == {"teacher_adapter", "teacher", "sparse"} | tuned
    if after == "null":
        again = run(recipe, out, *settings)
        assert again.returncode == 0, again.stderr


def test_processes_share_a_run_that_only_compresses(recipe: Path, tmp_path: Path) -> None:
    settings = [*("--set", "finetune=null"), *("--set", "evaluate=null")]
    grid = "quantize={group_size: 16, calibration: {samples: 4, length: 32}}"
    shared = run(recipe, tmp_path / "out", *settings, "--set", grid, processes=2)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("report:") == 1
    assert Artifact.open(tmp_path / "out" / "quantized").manifest["result"]["processes"] == 2
    nothing = run(recipe, tmp_path / "none", *settings, "--set", "sparsify=null", processes=2)
    assert nothing.returncode == 2
    assert nothing.stderr.count("compresses and trains nothing that 2 processes could share") == 1


def test_processes_share_a_distilled_step(recipe: Path, tmp_path: Path) -> None:
    """Unpacked rows of unequal length: each process has other counts of tokens and of labels."""
    distill = ["--set", "finetune.distill={hidden: 1, logits: 0.5}", "--set", "finetune.max_steps=3", *TRAINING]
    for processes, name in ((1, "one"), (2, "two")):
        done = run(recipe, tmp_path / name, *distill, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (adapter(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), name
    logs = [json.loads((tmp_path / n / "adapter" / "sqft" / "training_log.json").read_text()) for n in ("one", "two")]
    for at_one, at_two in zip(*(log["train"] for log in logs), strict=True):
        assert {"task_loss", "hidden", "logits"} < at_one.keys()
        assert at_one == pytest.approx(at_two, abs=2e-4)
    made = [Artifact.open(tmp_path / name / "adapter").manifest for name in ("one", "two")]
    assert made[0]["key"] == made[1]["key"]
    # Without a section teacher the recipe's own dense model is the teacher.
    assert made[0]["inputs"]["teacher"]["path"] == yaml.safe_load(recipe.read_text())["model"]


def test_what_processes_cannot_share_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    from sqft.adapters.attach import load_model

    monkeypatch.setenv("WORLD_SIZE", "3")
    config = FinetuneConfig.model_validate({"batch": 2, "accumulation": 2, "target_modules": ["q_proj"]})
    with pytest.raises(InputError, match=r"a step has 4 rows .* 3 processes cannot share evenly"):
        finetune.check(config, load_model(tiny_model("llama", "float32")))


def test_other_commands_want_one_process(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from sqft import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["plan", str(recipe)]) == 2
    assert "start one of this command" in capsys.readouterr().err
