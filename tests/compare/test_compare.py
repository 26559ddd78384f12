"""The grid of methods on a tiny model: shared stages run once, rows go on, failures stop nobody, pairs are paired."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft import pipeline
from sqft.artifact import Artifact
from sqft.cli.commands.showing import _any_failed
from sqft.compare import sweep
from sqft.compare.methods import METHODS, PAPER, default_methods, method_recipe, with_level
from sqft.compare.run import _run_row, row_file, run
from sqft.compare.summary import compare_pair, summarise
from sqft.compare.table import page
from sqft.errors import InputError
from sqft.pages.blocks import Table
from sqft.pages.render import form
from sqft.recipe import DistillConfig, Recipe, SparsifyConfig

CHOSEN = ("dense", "dense_lora", "sparse", "shears", "sparsepeft", "int4", "sqft", "qa_sparsepeft")


@pytest.fixture
def recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> Recipe:
    data = tmp_path / "data"
    data.mkdir()
    for split, first in (("train", 0), ("test", 40)):
        rows = [{"prompt": f"{a} + 1 =", "completion": f" {a + 1}"} for a in range(first, first + 24)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Recipe.model_validate(
        {
            "name": "grid",
            "model": str(tiny_model("llama", "bfloat16")),
            "data": {"task": str(data)},
            "sparsify": {"calibration": {"samples": 4, "length": 32}},
            "quantize": {"group_size": 16},
            "finetune": {
                "kind": "quantized", "ranks": [4, 2], "max_steps": 2, "length": 64, "batch": 2, "learning_rate": 0.02,
                "lora_alpha": 8,
            },
            "verify": {"prompts": 2, "accuracy_rows": 4},
            "evaluate": {"batch": 8},
        }
    )  # fmt: skip


def test_the_paper_has_ten_rows_and_each_is_three_choices() -> None:
    assert len(PAPER) == 10
    kinds = {name: (m.base, m.kind, m.elastic, m.merged) for name, m in METHODS.items() if name in PAPER}
    assert kinds["lora"] == ("sparse", "dense", False, False)
    assert kinds["shears"] == ("sparse", "dense", True, False)
    assert kinds["sparsepeft"] == ("sparse", "sparse", True, True)
    assert kinds["gptq_lora"] == ("int4", "dense", False, False)
    assert kinds["sqft"] == ("int4", "dense", True, False)
    assert kinds["qa_sparsepeft"] == ("int4", "quantized", True, True)


def test_a_row_differs_from_the_recipe_in_its_choices_alone(recipe: Recipe) -> None:
    lora = method_recipe(recipe, METHODS["lora"], 2)
    assert lora.finetune is not None
    assert recipe.finetune is not None
    assert lora.finetune == recipe.finetune.model_copy(update={"kind": "dense", "ranks": [4], "seed": 2})
    assert (lora.quantize, lora.merge, lora.sparsify) == (None, None, recipe.sparsify)
    dense = method_recipe(recipe, METHODS["dense_lora"], 0)
    assert (dense.sparsify, dense.quantize) == (None, None)
    assert dense.merge is not None
    for name, method in METHODS.items():  # every row is a recipe that could be written down
        Recipe.model_validate(method_recipe(recipe, method, 0).model_dump(exclude={"quantize": {"joint"}})), name


def test_rows_of_what_is_not_compressed_learn_from_no_teacher(recipe: Recipe) -> None:
    assert recipe.finetune is not None
    distill = DistillConfig(hidden=1)
    taught = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"distill": distill})})
    for name, method in METHODS.items():
        tuned = method_recipe(taught, method, 0).finetune
        assert tuned is None or tuned.distill == (None if name == "dense_lora" else distill), name
    unpruned = method_recipe(with_level(taught, "0"), METHODS["lora"], 0).finetune
    assert unpruned is not None and unpruned.distill is None


@pytest.mark.slow
def test_the_grid_runs_shares_stops_and_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ran: list[str] = []
    original = pipeline.run

    def counted(made: Recipe, folder: Path, *options: Any) -> Any:
        ran.append(folder.name)
        if folder.name == "shears-0" and ran.count("shears-0") == 1:
            raise RuntimeError("the first time it breaks")
        if folder.name == "sqft-0" and ran.count("sqft-0") == 1:
            raise KeyboardInterrupt
        return original(made, folder, *options)

    monkeypatch.setattr(pipeline, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, CHOSEN)
    assert json.loads(row_file(out, "shears", 0).read_text())["status"] == "failed"
    assert json.loads(row_file(out, "int4", 0).read_text())["status"] == "done"  # it came after the failure
    table = (out / "compare.md").read_text()
    assert "failed: seed 0: RuntimeError: the first time it breaks" in table
    assert "not run yet" in table
    first = list(ran)
    run(recipe, out, CHOSEN)
    assert ran[len(first) :] == ["shared", "shears-0", "sqft-0", "qa_sparsepeft-0"]  # the failed, the cut, the rest
    summary = json.loads((out / "compare.json").read_text())
    assert [method["method"] for method in summary["methods"]] == list(CHOSEN)
    assert not any(method["failed"] or method["pending"] for method in summary["methods"])
    by_name = {method["method"]: method for method in summary["methods"]}
    assert by_name["qa_sparsepeft"]["one_model"] == "yes, verified"
    assert by_name["sqft"]["one_model"] == "–"
    assert by_name["dense_lora"]["one_model"].startswith("yes")
    assert (by_name["sqft"]["precision"], by_name["qa_sparsepeft"]["precision"]) == ("INT4 + adapter", "INT4")
    assert by_name["qa_sparsepeft"]["stored_bytes"] < by_name["dense"]["stored_bytes"]
    # Bases were made once and are the same for all rows on them.
    digest = Artifact.open(out / "shared" / "sparse").digest
    for name in ("shears", "sparsepeft", "qa_sparsepeft"):
        assert (out / "runs" / f"{name}-0" / "sparse").is_symlink()
        assert Artifact.open(out / "runs" / f"{name}-0" / "sparse").digest == digest
    html = (out / "compare.html").read_text()
    assert "SQFT + QA-SparsePEFT" in html
    # Further seeds are added to what is there; an untuned row has one.
    ran.clear()
    run(recipe, out, ("dense", "sparsepeft"), seeds=2)
    assert ran == ["shared", "sparsepeft-1"]
    changed = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"max_steps": 3})})
    with pytest.raises(InputError, match="was made with other settings"):
        run(changed, out, ("sparsepeft",))


@pytest.mark.parametrize("compress", [True, False])
def test_the_teacher_is_a_row_and_made_once(recipe: Recipe, tmp_path: Path, compress: bool) -> None:
    teacher = {"ranks": [4], "max_steps": 2, "length": 64, "batch": 2, "learning_rate": 0.02, "compress": compress}
    taught = Recipe.model_validate({**recipe.model_dump(), "teacher": teacher})
    methods = default_methods(taught)
    assert (methods[2], len(methods)) == ("teacher", 11)
    out = tmp_path / "out"
    run(taught, out, ("dense", "teacher", "sparse"))
    summary = {row["method"]: row for row in json.loads((out / "compare.json").read_text())["methods"]}
    assert not any(row["failed"] or row["pending"] for row in summary.values())
    assert summary["teacher"]["one_model"] == "–"
    assert summary["teacher"]["stored_bytes"] == summary["dense"]["stored_bytes"]
    base = taught.model if not compress else str(out / "shared" / "teacher")
    made_from = Artifact.open(out / "shared" / "sparse").manifest["inputs"]["model"]
    assert made_from["path"] == base
    assert (out / "runs" / "teacher-0" / "teacher").is_symlink()
    assert not (out / "runs" / "dense-0" / "teacher").exists()
    nll = {name: next(v for key, v in row["tasks"].items() if key.endswith("_nll")) for name, row in summary.items()}
    assert nll["teacher"]["value"] < nll["dense"]["value"]


def test_what_cannot_be_compared_is_refused_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        unfit = recipe.model_copy(update={"sparsify": None, "evaluate": None})
        run(unfit, tmp_path / "o", ("shears", "shear", "teacher"))
    text = str(caught.value)
    assert "has no section teacher" in text
    assert "there is no method 'shear'" in text
    assert "evaluate: null" in text
    assert "no sparsify" in text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "links"), [("dense_lora", []), ("shears", ["sparse"]), ("sqft", ["quantized", "sparse"])]
)
def test_a_row_has_the_bases_that_it_stands_on_and_no_others(
    name: str, links: list[str], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base in ("sparse", "quantized"):
        (tmp_path / "shared" / base).mkdir(parents=True)

    def stop(*_args: Any) -> None:
        raise InputError("enough")

    monkeypatch.setattr(pipeline, "run", stop)
    assert not _run_row(recipe, tmp_path, name, 0, tmp_path, "data", "command")
    assert sorted(path.name for path in (tmp_path / "runs" / f"{name}-0").iterdir()) == links


def test_a_folder_that_cannot_be_made_is_refused_and_not_waited_for(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be used as output folder \(.*\); choose another --out"):
        run(recipe, tmp_path / "file", ("dense",))


def test_costs_count_what_they_were_measured_on(recipe: Recipe, tmp_path: Path) -> None:
    """Seconds of a resumed training are those of its last steps; those of a row's answers exclude loading the model."""
    sparse = recipe.model_copy(update={"sparsify": SparsifyConfig(pattern="1:4")})
    tasks = {
        "a": {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 40, "correct": "10" * 20},
        "wikitext2": {"metric": "perplexity", "value": 9.0, "stderr": 0.1, "n": 7},
    }
    training = {
        "steps": 10, "seconds": 12.0, "resumed_at_step": 4, "peak_memory_bytes": 5, "trainable_parameters": 1,
        "final_loss": 1.0,
    }  # fmt: skip
    cost = {"seconds": 90.0, "peak_memory_bytes": 5, "answering": {"a": 8.0, "wikitext2": 30.0}}
    done = {
        "method": "lora", "label": "LoRA", "seed": 0, "status": "done", "tasks": tasks, "verified": None,
        "checks": None, "precision": "16 bit", "stored_bytes": 5, "training": training, "evaluation": cost,
    }  # fmt: skip
    failed = {"method": "lora", "seed": 1, "status": "failed", "reason": "no"}
    row_file(tmp_path, "lora", 0).parent.mkdir()
    row_file(tmp_path, "lora", 0).write_text(json.dumps(done))
    row_file(tmp_path, "lora", 1).write_text(json.dumps(failed))
    summary = summarise(sparse, tmp_path, ["lora"], 3)
    assert summary["sparsity"] == 0.75
    assert summary["methods"][0]["training"]["seconds_per_step"] == 2.0
    assert summary["methods"][0]["rows_per_second"] == 5.0
    assert costs(summary) == {
        **{"Method": "LoRA", "precision": "16 bit", "stored": "5 B", "s / step": "2.00", "peak memory": "5 B"},
        **{"rows / s": "5.0", "seeds": "1 (1 failed, 1 pending)"},
    }
    # A training that was resumed after its last step, and a row of before answers were timed apart.
    del cost["answering"]
    row_file(tmp_path, "lora", 0).write_text(json.dumps(done | {"training": training | {"resumed_at_step": 10}}))
    summary = summarise(sparse, tmp_path, ["lora"], 1)
    assert (summary["methods"][0]["training"]["seconds_per_step"], summary["methods"][0]["rows_per_second"]) == (
        None,
    ) * 2
    known = {"Method": "LoRA", "precision": "16 bit", "stored": "5 B", "peak memory": "5 B", "seeds": "1"}
    assert costs(summary) == known, "a column without a figure is left out"


def costs(summary: dict[str, Any]) -> dict[str, Any]:
    (shown,) = page(summary).sections[1].blocks
    assert isinstance(shown, Table)
    return dict(zip(shown.heads, shown.rows[0].cells, strict=True))


def row(seed: int, correct: str) -> dict[str, Any]:
    value = correct.count("1") / len(correct)
    return {"seed": seed, "status": "done", "tasks": {"t": {"metric": "x", "value": value, "correct": correct}}}


def test_pairs_are_compared_row_by_row() -> None:
    one = [row(0, "1110"), row(1, "1100")]
    other = [row(0, "1000"), row(1, "0100"), row(7, "1111")]
    found = compare_pair(one, other)
    assert found is not None
    differences = [1 - 0.5, 1 - 0.5, 0.5 - 0, 0 - 0]  # seeds 0 and 1, averaged, by row
    half = 1.959964 * statistics.stdev(differences) / 2
    assert found["difference"] == pytest.approx(statistics.mean(differences))
    assert (found["low"], found["high"]) == pytest.approx((0.375 - half, 0.375 + half))
    assert (found["n"], len(found["by_seed"])) == (4, 2)
    assert compare_pair(one, [row(7, "1111")]) is None
    same = compare_pair(one, one)
    assert same is not None
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)


def test_likelihoods_are_compared_row_by_row() -> None:
    def with_nll(seed: int, nats: list[float], tokens: list[int]) -> dict[str, Any]:
        found = row(seed, "1110"[: len(nats)])
        (task,) = found["tasks"].values()
        task["a_nll"] = {"metric": "nll", "value": sum(nats) / sum(tokens), "rows": nats, "tokens": tokens}
        return found

    one = [with_nll(0, [1.0, 3.0, 2.0], [1, 2, 1]), with_nll(1, [2.0, 5.0, 2.0], [1, 2, 1])]  # over seeds 1.5, 4, 2
    other = [with_nll(0, [1.0, 1.0, 2.0], [1, 2, 1]), with_nll(1, [1.0, 1.0, 2.0], [1, 2, 1])]
    found = compare_pair(one, other)
    assert found is not None
    difference = (0.5 + 3 + 0) / 4
    residuals = [0.5 - difference, 3 - 2 * difference, 0 - difference]
    half = 1.959964 * (3 / 2 * sum(r * r for r in residuals)) ** 0.5 / 4
    assert found["nll"] == pytest.approx(
        {"difference": difference, "low": difference - half, "high": difference + half}
    )
    without = compare_pair(one, [row(0, "111"), row(1, "110")])
    assert without is not None
    assert "nll" not in without


def test_means_have_errors_over_rows_and_over_seeds(recipe: Recipe, tmp_path: Path) -> None:
    for seed, correct in enumerate(("1110", "1100", "1111")):
        value = correct.count("1") / 4
        entry = {"metric": "acc", "value": value, "stderr": 0.2, "n": 4, "correct": correct}
        values = {
            "method": "lora", "label": "LoRA", "seed": seed, "status": "done", "tasks": {"a": entry, "b": entry},
            "verified": None, "checks": None, "precision": "16 bit", "stored_bytes": 5, "training": None,
        }  # fmt: skip
        row_file(tmp_path, "lora", seed).parent.mkdir(exist_ok=True)
        row_file(tmp_path, "lora", seed).write_text(json.dumps(values))
    (method,) = summarise(recipe, tmp_path, ["lora"], 3)["methods"]
    assert method["tasks"]["a"]["value"] == pytest.approx(0.75)
    assert method["tasks"]["a"]["stderr_seeds"] == pytest.approx(0.25 / 3**0.5)
    assert method["tasks"]["a"]["stderr_rows"] == pytest.approx(0.2)
    assert method["all"]["n"] == 8
    assert method["all"]["stderr_rows"] == pytest.approx((0.75 * 0.25 / 7) ** 0.5)


def test_levels_of_a_sweep(recipe: Recipe) -> None:
    assert with_level(recipe, "0").sparsify is None
    third = with_level(recipe, "0.3").sparsify
    assert third is not None
    assert recipe.sparsify is not None
    assert (third.sparsity, third.calibration) == (0.3, recipe.sparsify.calibration)
    pattern = with_level(recipe, "2:4").sparsify
    assert pattern is not None
    assert pattern.pattern == "2:4"
    with pytest.raises(InputError, match="there is no method 'nope'"):
        sweep.run(recipe, Path("nowhere"), ["0"], ["nope"])
    for bad in ("many", "1.5", "4:2"):
        with pytest.raises(InputError, match="level"):
            with_level(recipe, bad)
    unpruned = sweep.methods_at(with_level(recipe, "0"), sweep.DEFAULT)
    assert unpruned == ["dense", "dense_lora", "int4", "gptq_lora", "sqft", "qa_lora", "qa_sparsepeft"]


def test_a_sweep_draws_every_value() -> None:
    values = {
        "lora": {"0.5": 0.1},
        "shears": {"0": 0.2, "0.5": 0.15, "2:4": 0.05},
        "sqft": {"2:4": 0.04, "1:4": 0.01},
    }
    methods = {name: {level: {"value": value} for level, value in row.items()} for name, row in values.items()}
    drawn = sweep.chart({"levels": ["0.5", "2:4", "0", "1:4"], "methods": methods})
    marks = re.findall(r"<title>([^<]+)</title>.*?<use [^>]*\bx=\"([\d.]+)\"", drawn)
    assert [title for title, _ in marks] == [
        "LoRA, sparsity (%) 50: 10",
        "Shears, sparsity (%) 0: 20",
        "Shears, sparsity (%) 50: 15",
        "Shears at 2:4, sparsity (%) 50: 5",
        "SQFT, sparsity (%) 50: 4",
        "SQFT, sparsity (%) 75: 1",
    ]
    across = [float(x) for _, x in marks]
    assert across[0] == across[2] == across[3] == across[4]
    assert across[1] < across[0] < across[5]
    texts = re.findall(r">([^<]+)</text>", drawn)
    assert all(texts.count(name) == 1 for name in ("LoRA", "Shears", "SQFT", "hollow: 2:4, 1:4"))
    assert "Shears at 2:4" not in texts
    assert "Shears at 2:4 50 %: 5.0" in drawn
    assert sweep.chart({"levels": ["0"], "methods": {"lora": {}}}) == ""


def test_the_page_draws_every_method(recipe: Recipe, tmp_path: Path) -> None:
    row_file(tmp_path, "lora", 0).parent.mkdir()
    for name, value in (("lora", 0.25), ("sparsepeft", 0.5)):
        entry = {"metric": "acc", "value": value, "stderr": 0.2, "n": 4, "correct": "1100" if value > 0.3 else "1000"}
        values = {
            "method": name, "label": METHODS[name].label, "seed": 0, "status": "done", "tasks": {"a": entry},
            "verified": None, "checks": None, "precision": "16 bit", "stored_bytes": 5, "training": None,
        }  # fmt: skip
        row_file(tmp_path, name, 0).write_text(json.dumps(values))
    shown = page(summarise(recipe, tmp_path, ["lora", "sparsepeft"], 1))
    html = form("page.html.j2", page=shown, version="1", text_form="compare.md")
    titles = re.findall(r"<title>([^<]+)</title>", html)[1:]
    assert titles == ["LoRA: 25.0 ± 20.0", "SQFT + SparsePEFT: 50.0 ± 20.0"]
    for text in ("LoRA", "25.0 ± 20.0", "SQFT + SparsePEFT", "50.0 ± 20.0"):
        assert f">{text}</text>" in html


@pytest.mark.slow
def test_a_sweep_draws_every_level(recipe: Recipe, tmp_path: Path) -> None:
    path = sweep.run(recipe, tmp_path / "out", ["0", "0.6"], ["sparse", "sparsepeft", "int4"])
    summary = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {name: sorted(values) for name, values in summary["methods"].items()} == {
        "sparse": ["0", "0.6"], "sparsepeft": ["0.6"], "int4": ["0", "0.6"],
    }  # fmt: skip
    assert "<svg" in path.read_text()
    made = Artifact.open(tmp_path / "out" / "sparsity-0.6" / "shared" / "sparse").manifest["result"]
    assert made["sparsity"] == pytest.approx(0.6, abs=0.02)


def test_a_failed_row_of_any_level_decides_the_exit_code(tmp_path: Path) -> None:
    tables = []
    for level, failed in (("0", []), ("0.5", [{"seed": 0, "reason": "no"}])):
        tables.append(tmp_path / level)
        tables[-1].write_text(json.dumps({"methods": [{"failed": []}, {"failed": failed}]}))
    assert not _any_failed(tables[0])
    assert _any_failed(*tables)


def test_the_words_name_the_bits_of_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    eight = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"bits": 8})})  # type: ignore[union-attr]
    run(eight, tmp_path / "out", ["int4"], 1, lambda _: None, "typed")
    (method,) = summarise(eight, tmp_path / "out", ["int4"], 1)["methods"]
    assert (method["label"], method["precision"]) == ("sparse INT8, untuned", "INT8")
