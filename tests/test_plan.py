"""A forecast of a tiny run, against the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft import pipeline
from sqft.artifact import Artifact
from sqft.errors import InputError
from sqft.plan import _figures, _short_search, as_json, plan
from sqft.recipe import Recipe


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


@pytest.mark.slow
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


def test_what_has_no_shorter_form_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model("llama", "bfloat16"), tmp_path)
    with pytest.raises(InputError, match="has 2 blocks, so few that a run is its own probe"):
        plan(recipe, tmp_path / "out")


def test_a_search_is_drawn_on_to_all_configurations_and_rows(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "model", tmp_path)
    config = recipe.search.model_copy(update={"strategy": "hill_climbing", "turns": 5, "neighbours": 8, "samples": 100})
    short = _short_search(config)
    assert (short.strategy, short.budget, short.samples) == ("hill_climbing", 3, config.batch)
    assert _short_search(config.model_copy(update={"strategy": "file"})).strategy == "heuristic"
    folder = tmp_path / "run" / "sub_adapter" / "sqft"
    folder.mkdir(parents=True)
    manifest = {"seconds": 10.0, "size_bytes": 7, "peak_memory_bytes": 9}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "search.json").write_text(json.dumps({"trials": [{"seconds": 2.0}] * 3, "rows": {"a": 6, "b": 4}}))
    found = _figures(recipe.model_copy(update={"search": config}), tmp_path / "run", 0.0, judged=100)
    # 4 s for the model, 41 configurations of 100 rows at 0.2 s a row.
    assert found == {"search": {"disk": 7, "memory": 9, "seconds": pytest.approx(4 + 41 * 100 * 0.2)}}
