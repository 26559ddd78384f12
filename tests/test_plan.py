"""A forecast of a tiny run, against the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import forked
from sqft import artifact, pipeline
from sqft.artifact import Artifact
from sqft.data.load import Data
from sqft.disk import read_json, write_json
from sqft.errors import InputError
from sqft.evaluation import perplexity, prepacked
from sqft.model.opening import load_config
from sqft.plan import as_json, blocks_differ, plan, probe
from sqft.plan.copies import on_copy
from sqft.plan.probe import _figures, _short_search, rows_of, run_apart
from sqft.recipe import EvaluateConfig, Recipe, TeacherConfig


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes begin with all imports done."""
    monkeypatch.setattr(probe, "multiprocessing", SimpleNamespace(get_context=lambda _: forked.Context))


def make_recipe(model: Path, folder: Path) -> Recipe:
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {a} + 1 =", "completion": f" {a + 1}"} for a in range(12)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Recipe.model_validate(
        {
            "name": "forecast",
            "model": str(model),
            "data": {"task": str(folder)},
            "sparsify": {"pattern": "1:4", "calibration": {"samples": 4, "length": 32}},
            "quantize": {"group_size": 16},
            "finetune": {"kind": "quantized", "ranks": [4, 2], "max_steps": 4, "length": 64, "batch": 2},
            "verify": {"prompts": 2, "accuracy_rows": 4},
            "evaluate": {"batch": 4},
        }
    )


@pytest.mark.usefixtures("_forked")
def test_disk_is_forecast_to_the_byte_but_for_headers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model("llama", "bfloat16", num_hidden_layers=8), tmp_path)
    forecasts = {forecast.stage: forecast for forecast in plan(recipe, tmp_path / "out")}
    stages = ["quantize", "finetune", "search", "merge", "verify"]
    assert list(forecasts) == [*stages, "evaluate dense", "evaluate merged", "evaluate quantized", "evaluate tuned"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".plan")]
    pipeline.run(recipe, tmp_path / "out")
    for stage, folder in (("quantize", "quantized"), ("finetune", "adapter"), ("merge", "merged")):
        made = Artifact.open(tmp_path / "out" / folder).manifest["size_bytes"]
        assert forecasts[stage].disk_bytes == pytest.approx(made, rel=0.05)
        assert forecasts[stage].fits
    assert as_json(list(forecasts.values()))["peak_memory_bytes"] == max(f.memory_bytes for f in forecasts.values())


@pytest.mark.slow
def test_a_probe_begins_afresh(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    values = {"finetune": None, "evaluate": None}
    recipe = make_recipe(tiny_model("llama", "bfloat16"), tmp_path).model_copy(update=values)
    found = run_apart(recipe, tmp_path / "probe", laid_out=True)
    made = Artifact.open(tmp_path / "probe" / "run" / "quantized").manifest
    assert found["quantize"]["disk"] == made["size_bytes"]
    assert found["quantize"]["memory"] == made["peak_memory_bytes"]


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("trained", [False, True])
def test_a_teacher_is_forecast_with_its_adapter_shortened_as_the_model_is(
    trained: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", "bfloat16", num_hidden_layers=8)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    teacher = TeacherConfig(adapter=str(tmp_path / "adapter"))
    if trained:
        teacher = TeacherConfig(ranks=[4], max_steps=4, length=64, batch=2)
    values = {"finetune": None, "evaluate": None, "teacher": teacher}
    recipe = make_recipe(model, tmp_path).model_copy(update=values)
    forecasts = {forecast.stage: forecast for forecast in plan(recipe, tmp_path / "out")}
    assert list(forecasts) == [*(["finetune the teacher"] if trained else []), "teacher", "quantize"]
    pipeline.run(recipe, tmp_path / "out")
    made = Artifact.open(tmp_path / "out" / "teacher").manifest["size_bytes"]
    assert forecasts["teacher"].disk_bytes == pytest.approx(made, rel=0.05)


def test_a_tuned_model_stands_in_for_itself_in_a_forecast(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, copy = tiny_model("llama", num_hidden_layers=4), tiny_model("llama")
    recipe = make_recipe(model, tmp_path).model_copy(update={"teacher": TeacherConfig(model="mine", revision="v1")})
    assert on_copy(recipe, model, copy, model).teacher == TeacherConfig(model=str(copy))


def test_what_has_no_shorter_form_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model("llama", "bfloat16"), tmp_path)
    with pytest.raises(InputError, match="has 2 blocks, so few that a run is its own probe"):
        plan(recipe, tmp_path / "out")


@pytest.mark.parametrize(("most", "expected"), [(0, False), (2**30, True)])
def test_copies_lay_weights_out_anew_only_if_the_model_is_small_enough(
    most: int, expected: bool, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def run(_recipe: Recipe, _folder: Path, *, laid_out: bool) -> dict[str, dict[str, float]]:
        told.append(laid_out)
        return {"evaluate dense": {"disk": 0, "memory": 1, "gpu": 0, "seconds": 1}}

    monkeypatch.setattr(prepacked, "MOST_BYTES", most)
    monkeypatch.setattr(prepacked, "_form", lambda: prepacked._Reordered)
    monkeypatch.setattr("sqft.plan.run_apart", run)
    plan(make_recipe(tiny_model("llama", "bfloat16", num_hidden_layers=8), tmp_path), tmp_path / "out")
    assert told == [expected, expected]


@pytest.mark.parametrize(("blocks", "slow", "counts"), [(12, False, [2, 10]), (12, True, [2, 6]), (8, False, [2, 6])])
def test_the_second_copy_is_longer_where_the_first_was_quick_and_nothing_shrinks_with_blocks(
    blocks: int,
    slow: bool,
    counts: list[int],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probed = []

    def run(recipe: Recipe, _folder: Path, **_options: bool) -> dict[str, dict[str, float]]:
        count = load_config(Path(recipe.model)).num_hidden_layers
        probed.append(count)
        return {
            "merge": {"disk": 100 * count, "memory": 1000 - count, "gpu": 20 * count, "seconds": 0.5 * count},
            "verify": {"disk": 0, "memory": 50 + 10 * count, "gpu": 0, "seconds": 1},
        }

    monkeypatch.setattr("sqft.plan.run_apart", run)
    monkeypatch.setattr("sqft.plan._QUICK_SECONDS", 0.0 if slow else 1e9)
    recipe = make_recipe(tiny_model("llama", "bfloat16", num_hidden_layers=blocks), tmp_path)
    merge, verify = plan(recipe, tmp_path / "out")
    assert probed == counts
    assert (merge.disk_bytes, merge.seconds) == (100 * blocks, 0.5 * blocks)
    assert merge.memory_bytes == 998  # noise of the probes, not a saving
    assert verify.memory_bytes == 50 + 10 * blocks
    assert (merge.gpu_bytes, verify.gpu_bytes, merge.fits) == (20 * blocks, 0, True)
    monkeypatch.setattr("sqft.plan.free_bytes", lambda _: 20 * blocks - 1)
    merge, verify = plan(recipe, tmp_path / "out")
    assert (merge.fits, verify.fits) == (False, True), "one byte more than the card has free"


def test_a_search_is_drawn_on_to_all_configurations_and_rows(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "model", tmp_path)
    config = recipe.search.model_copy(update={"strategy": "hill_climbing", "turns": 5, "neighbours": 8, "samples": 100})
    short = _short_search(config)
    assert (short.strategy, short.budget, short.samples) == ("hill_climbing", 3, config.batch)
    assert _short_search(config.model_copy(update={"strategy": "file"})).strategy == "heuristic"
    description = artifact.describe("search", {}, {}, seed=0)
    with artifact.writing(tmp_path / "run" / "sub_adapter", description) as draft:
        write_json(draft.path / "sqft" / "search.json", {"trials": [{"seconds": 2.0}] * 3, "rows": {"a": 6, "b": 4}})
    file = tmp_path / "run" / "sub_adapter" / "sqft" / "manifest.json"
    write_json(file, read_json(file) | {"seconds": 10.0, "size_bytes": 7, "peak_memory_bytes": 9})
    found = _figures(recipe.model_copy(update={"search": config}), tmp_path / "run", {}, judged=100)
    # 4 s for the model, 41 configurations of 100 rows at 0.2 s a row.
    assert found == {"search": {"disk": 7, "memory": 9, "gpu": 0, "seconds": pytest.approx(4 + 41 * 100 * 0.2)}}


def test_answers_are_drawn_on_to_all_rows_and_loading_is_not(tmp_path: Path) -> None:
    result = {
        "tasks": {"own": {"n": 4}, "wikitext2": {"n": 2}},
        "cost": {
            "seconds": 10.0,
            "peak_memory_bytes": 9,
            "peak_gpu_bytes": 5,
            "answering": {"own": 2.0, "wikitext2": 3.0},
        },
    }
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    (tmp_path / "run" / "evaluations" / "dense.json").write_text(json.dumps(result))
    recipe = make_recipe(tmp_path / "model", tmp_path)
    found = _figures(recipe, tmp_path / "run", {"own": 40, "wikitext2": 8}, judged=0)
    assert found == {"evaluate dense": {"disk": 0, "memory": 9, "gpu": 5, "seconds": pytest.approx(10 - 5 + 20 + 12)}}


def test_a_text_for_perplexity_counts_in_windows(
    tiny_model: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "perplexity_tokens", lambda *_: torch.arange(100))
    monkeypatch.setattr(perplexity, "WINDOW", 8)
    recipe = make_recipe(tiny_model("llama"), tmp_path)
    own = recipe.data.task
    for limit, expected in ((None, [12, 12]), (5, [5, 5])):
        asked = rows_of(recipe, EvaluateConfig(tasks=["wikitext2", own], limit=limit), Data(tiny_tokenizer))
        assert list(asked.values()) == expected
    assert rows_of(recipe, EvaluateConfig(tasks=["wikitext2"]), Data(tiny_tokenizer)) == {"wikitext2": 12}


def test_patterns_of_layers_that_the_copy_lacks_are_left_out(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model("llama", num_hidden_layers=4), tmp_path)
    assert recipe.sparsify is not None
    late = recipe.sparsify.model_copy(update={"ignore": ["*.layers.3.*", "up_proj", "no_such"]})
    model, copy = Path(recipe.model), tiny_model("llama")
    made = on_copy(recipe.model_copy(update={"sparsify": late}), model, copy)
    assert made.sparsify is not None
    # What matches nowhere stays: the probe says so as the run would.
    assert (made.sparsify.targets, made.sparsify.ignore) == (["*"], ["up_proj", "no_such"])
    assert made.model == str(copy)
    only = recipe.sparsify.model_copy(update={"targets": ["*.layers.3.*"]})
    with pytest.raises(InputError, match=r"sparsify.targets .* name late layers alone"):
        on_copy(recipe.model_copy(update={"sparsify": only}), model, copy)


def test_blocks_that_differ_are_told_from_those_that_do_not(tiny_model):
    from sqft.model.targets import skeleton

    for family, differ in (("llama", False), ("mixtral", False), ("deepseek_v3", True)):
        model = skeleton(tiny_model(family))
        assert blocks_differ(model, model.config.num_hidden_layers) == differ, family
