"""The grid of `benchmarks/recovery.py`: its cells, its order of work, and all of it on a tiny model."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DONE = {"status": "done"}


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recovery")


class Inline:
    """A pool that works in this process, and dies in its first `deaths` jobs."""

    def __init__(self, deaths: int = 0) -> None:
        self.deaths = deaths

    def submit(self, action: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if self.deaths:
            self.deaths -= 1
            future.set_exception(BrokenProcessPool("died"))
        else:
            future.set_result(action(*arguments))
        return future

    def shutdown(self) -> None:
        pass


def test_every_cell_is_a_recipe_that_trains_its_budget(recovery: Any) -> None:
    scale = recovery.Scale(steps=10)
    assert len({cell.name for cell in recovery.GRID}) == len(recovery.GRID)
    assert set(recovery.ALWAYS) <= {cell.name for cell in recovery.GRID}
    for cell in recovery.GRID:
        reason = recovery.refused(cell.recipe(Path("model"), Path("validation.jsonl"), scale, 0))
        assert reason is None
        assert sum(cell.steps(scale)) == 10 * cell.budget
    wrong = recovery.Cell("sparse4").recipe(Path("model"), Path("validation.jsonl"), scale, 0)
    assert "sparsities" in recovery.refused({**wrong, "sparsify": {"sparsities": 0.5}})


def test_cells_share_what_is_equal_before_their_training(recovery: Any) -> None:
    scale = recovery.Scale(steps=10)

    def beginnings(**choices: Any) -> list[dict[str, Any]]:
        cell = recovery.Cell("sparse4", **choices)
        found: list[dict[str, Any]] = recovery.beginnings(cell.recipe(Path("m"), Path("v.jsonl"), scale, 0))
        return found

    assert beginnings() == beginnings(rank=128) == beginnings(linears="five", budget=2)
    assert beginnings() != beginnings(update=True)
    tuned, compressed = beginnings(teacher=True)
    assert "sparsify" not in tuned
    assert compressed["sparsify"] == beginnings()[0]["sparsify"]
    assert beginnings(teacher=True) != beginnings(teacher=True, budget=2)
    assert recovery.beginnings(recovery.Cell("dense").recipe(Path("m"), Path("v.jsonl"), scale, 0)) == []


def test_jobs_wait_for_what_they_need_and_fail_with_it(recovery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, broken = (recovery.Job(name, {}, Path(name)) for name in ("base", "broken"))
    jobs = [broken, base, *(recovery.Job(f"on {job.name}", {}, Path(), job) for job in (broken, base))]
    began: list[str] = []
    ended: dict[str, Any] = {}

    def do(job: Any) -> dict[str, Any]:
        began.append(job.name)
        return {"status": "failed", "reason": "no"} if job is broken else DONE

    def run(pool: Inline, deadline: float) -> None:
        began.clear(), ended.clear()
        recovery.schedule(jobs, pool, 2, deadline, lambda job, outcome: ended.update({job.name: outcome}))

    monkeypatch.setattr(recovery, "do", do)
    monkeypatch.setattr(recovery, "start", lambda workers: Inline())
    run(Inline(), time.monotonic() + 60)
    assert began == ["broken", "base", "on base"]
    assert ended["on base"] == DONE
    assert ended["on broken"] == {"status": "failed", "reason": "broken: no"}
    run(Inline(), time.monotonic() - 1)
    assert (began, ended) == ([], {})
    run(Inline(deaths=2), time.monotonic() + 60)  # both jobs at work go down with the pool, and are done in the next
    assert ended["on base"] == DONE


def test_scores_are_pooled_over_the_rows_of_all_tasks(recovery: Any) -> None:
    def task(name: str, right: float, rows: list[float], tokens: list[int]) -> dict[str, Any]:
        return {"value": right, "n": len(rows), f"{name}_nll": {"rows": rows, "tokens": tokens}}

    row = {"tasks": {"a": task("a", 1.0, [1.0, 3.0], [1, 1]), "b": task("b", 0.0, [0.0, 0.0], [1, 1])}}
    found = recovery.pooled(row, ["a", "b"])
    assert (found["n"], found["accuracy"], found["nll"]) == (4, 0.5, 1.0)
    assert found["accuracy_stderr"] == pytest.approx((0.25 / 3) ** 0.5)
    assert found["nll_stderr"] == pytest.approx((6 / 3 / 4) ** 0.5)  # of a mean of four


def write_data(folder: Path) -> None:
    """Write sums in the form of MAWPS and SVAMP."""
    number = 0
    for place, count in {"mawps/train": 24, "mawps/validation": 3, "mawps/test": 3, "svamp/test": 2}.items():
        rows = []
        for _ in range(count):
            number += 1
            text, sum_ = f"Ann has {number} pens and {2 * number} cups.", f"{number} + {2 * number}"
            answer = str(3 * number)
            mawps = {"question": f"{text} How many?", "equation": f"X=({sum_})", "answer": answer}
            svamp = {"Body": text, "Question": "How many?", "Equation": sum_, "Answer": answer}
            rows.append(svamp if place == "svamp/test" else mawps)
        file = folder / f"{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_grid_on_a_tiny_model(
    recovery: Any,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path / "data")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model, out = tiny_model("llama", "bfloat16", **shape), tmp_path / "out"
    taught, wrong = "sparse4-update-teacher-seven-r32-x1", "sparse4-five-r32-x1"
    scale = {"steps": 2, "length": 384, "batch": 2, "samples": 4, "evaluated": 8, "threads": 1}
    options = ["--data", str(tmp_path / "data"), "--out", str(out), "--cells", taught, wrong]
    options += [text for name, value in scale.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["recovery.py", str(model), *options])
    for variable in ("SQFT_DATA_DIR", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "")  # the script sets them
    monkeypatch.setattr(recovery, "start", lambda workers: Inline())
    monkeypatch.setattr("recovery_cells.FIVE", ["no_proj"])
    recovery.main()
    result = json.loads((out / "recovery.json").read_text())
    dense, lora = (f"{name}-s0" for name in recovery.ALWAYS)
    rows = result["cells"]
    done = {dense: "done", lora: "done", f"{taught}-s0": "done"}
    assert {name: row["status"] for name, row in rows.items()} == {**done, f"{wrong}-s0": "failed"}
    assert "no_proj" in rows[f"{wrong}-s0"]["reason"]
    row, reference = rows[f"{taught}-s0"], rows[lora]
    assert row["steps"] == [1, 1]
    assert {name: training["steps"] for name, training in row["training"].items()} == {
        "teacher_adapter": 1,
        "adapter": 1,
    }
    assert set(row["seconds"]) == {"teacher_adapter", "teacher", "quantized", "adapter", "merged", "evaluate"}
    assert (row["validation"]["n"], row["test"]["n"]) == (3, 5)
    difference = row["against_lora"]["validation"]["nll"]["difference"]
    assert difference == pytest.approx(row["validation"]["nll"] - reference["validation"]["nll"])
    assert rows[dense]["test"]["nll"] != reference["test"]["nll"]
    assert (out / "cells" / f"{taught}-s0" / "quantized").is_symlink()
    assert (out / "cells" / f"{taught}-s0" / "merged" / "sqft" / "mask.safetensors").is_file()
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in done)
    assert f"{wrong}-s0: failed" in printed
