"""The numbers of a comparison: means over seeds with errors, and paired differences between methods.

Each mean has two standard errors: `rows`, from sampling the test rows (binomial, over the rows of all tasks), and
`seeds`, between training seeds (standard deviation / √seeds). Two methods are compared by the difference of their
seed-averaged correctness on each test row: its mean with a 95 % interval (normal, over rows). The rows are the same, so
the difficulty of a question cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.compare.methods import METHODS
from sqft.disk import read_json
from sqft.evaluation.likelihood import ratio_error
from sqft.recipe import QuantizeConfig

if TYPE_CHECKING:
    from sqft.recipe import Recipe

# (method, against, question).
PAIRS = (
    ("sparsepeft", "shears", "does masking cost accuracy? (merged against unmerged, float)"),
    ("sparsepeft", "lora", "one sparse model against a sparse base with LoRA beside it"),
    ("qa_sparsepeft", "sqft", "does merging into INT4 cost accuracy? (merged against unmerged, INT4)"),
    ("sparsepeft_lora", "lora", "does masking cost accuracy? (one rank, merged against unmerged, float)"),
    ("qa_lora", "gptq_lora", "does merging into INT4 cost accuracy? (one rank, merged against unmerged)"),
    ("sqft", "shears", "does an INT4 base cost accuracy?"),
    ("gptq_lora", "lora", "does an INT4 base cost accuracy? (one rank)"),
    ("shears", "lora", "do elastic ranks help? (float)"),
    ("sqft", "gptq_lora", "do elastic ranks help? (INT4)"),
    ("sparsepeft", "sparsepeft_lora", "do elastic ranks help? (masked)"),
    ("qa_sparsepeft", "qa_lora", "do elastic ranks help? (quantisation-aware)"),
    ("qa_sparsepeft", "qa_dequantized", "start at the compensated or at GPTQ's weight?"),
    ("qa_sparsepeft", "qa_float", "start at the compensated or at the float weight?"),
    ("qa_sparsepeft", "sparsepeft", "what does INT4 cost, both as one model?"),
    ("sparsepeft", "dense_lora", "what do the zeros cost, tuned?"),
    ("qa_sparsepeft", "dense_lora", "what do zeros and INT4 cost, tuned?"),
    ("sparsepeft", "teacher", "what do the zeros cost beside the teacher?"),
    ("qa_sparsepeft", "teacher", "what do zeros and INT4 cost beside the teacher?"),
)
_Z = 1.959964


def summarise(recipe: Recipe, out: Path, methods: Sequence[str], seeds: int) -> dict[str, Any]:
    """Return the content of the table."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in methods:
        files = [out / "rows" / f"{name}-{seed}.json" for seed in range(seeds)]
        rows[name] = [read_json(file) for file in files if file.is_file()]
    done = {name: [row for row in found if row["status"] == "done"] for name, found in rows.items()}
    integers = f"INT{(recipe.quantize or QuantizeConfig()).bits}"  # as which the words below say INT4
    return {
        "model": recipe.model,
        "data": recipe.data.task,
        "sparsity": None if recipe.sparsify is None else recipe.sparsify.fraction,
        "methods": [
            _method(name, rows[name], done[name], seeds, METHODS[name].label.replace("INT4", integers))
            for name in methods
        ],
        "pairs": [
            {"method": one, "against": other, "question": question.replace("INT4", integers), **pair}
            for one, other, question in PAIRS
            if (pair := compare_pair(done.get(one, []), done.get(other, []))) is not None
        ],
    }


def _method(
    name: str, rows: list[dict[str, Any]], done: list[dict[str, Any]], seeds: int, label: str
) -> dict[str, Any]:
    wanted = seeds if METHODS[name].kind is not None else 1
    failed = [row for row in rows if row["status"] == "failed"]
    value: dict[str, Any] = {
        "method": name,
        "label": label,
        "seeds": [row["seed"] for row in done],
        "pending": wanted - len(done) - len(failed),
        "failed": [{"seed": row["seed"], "reason": row["reason"]} for row in failed],
    }
    if not done:
        return value
    tasks = {}
    for task, entry in done[0]["tasks"].items():
        tasks[task] = mean_over_seeds([row["tasks"][task] for row in done])
        # Parts of a task's rows that are reported apart.
        for part in (name for name, value in entry.items() if isinstance(value, dict) and "value" in value):
            parts = [{"metric": entry["metric"], **row["tasks"][task][part]} for row in done]
            tasks[part] = mean_over_seeds(parts)
    shares = [entry for entry in done[0]["tasks"].values() if entry["metric"] != "perplexity"]
    trained = [row["training"] for row in done if row["training"]]
    return {
        **value,
        "tasks": tasks,
        "all": _pooled(done) if len(shares) > 1 else None,
        "one_model": _one_model(name, done),
        "precision": done[0]["precision"],
        "stored_bytes": done[0]["stored_bytes"],
        "training": {
            "steps": trained[0]["steps"],
            "seconds_per_step": _seconds_per_step(trained),
            "peak_memory_bytes": max(t["peak_memory_bytes"] for t in trained),
            "final_loss": round(statistics.mean(t["final_loss"] for t in trained), 4),
        }
        if trained
        else None,
        "rows_per_second": _rows_per_second(done),
    }


def _seconds_per_step(trained: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median seconds of a training step; None where a resumed training had none left to do."""
    # Of a training that was interrupted the seconds are those since it was resumed.
    ran = [(t["seconds"], t["steps"] - (t["resumed_at_step"] or 0)) for t in trained]
    each = [seconds / steps for seconds, steps in ran if steps]
    return round(statistics.median(each), 3) if each else None


def _rows_per_second(done: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how many test rows the model answered a second, all tasks together; None where that was not recorded."""
    speeds = []
    for row in done:
        seconds = (row.get("evaluation") or {}).get("answering", {})
        scored = [name for name in seconds if row["tasks"][name]["metric"] != "perplexity"]
        if took := sum(seconds[name] for name in scored):
            speeds.append(sum(row["tasks"][name]["n"] for name in scored) / took)
    return round(statistics.median(speeds), 2) if speeds else None


def _one_model(name: str, done: Sequence[Mapping[str, Any]]) -> str:
    """Return whether the row gives one merged model, according to verify."""
    if not METHODS[name].merged:
        return "–"
    if METHODS[name].kind != "dense":
        return "yes, verified" if all(row["verified"] for row in done) else "NOT verified"
    # Adding a dense delta rounds the sum: every weight is as it should be, and logits are not to the bit.
    checks = [(check, passed) for row in done for check, passed in row["checks"].items()]
    return "yes, to rounding" if all(passed for check, passed in checks if check != "logits_equal") else "NOT verified"


def mean_over_seeds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {metric, value, stderr_rows, stderr_seeds, n} of one task."""
    values = [entry["value"] for entry in entries]
    errors = [entry["stderr"] for entry in entries if entry["stderr"] is not None]
    return {
        "metric": entries[0]["metric"],
        "value": statistics.mean(values),
        "stderr_rows": statistics.mean(errors) if errors else None,
        "stderr_seeds": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        "n": entries[0]["n"],
    }


def _pooled(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the score over the rows of all tasks together."""
    each = [_correct(row) for row in done]
    values = [statistics.mean(correct) for correct in each]
    n, mean = len(each[0]), statistics.mean(values)
    return {
        "metric": "share of all rows right",
        "value": mean,
        "stderr_rows": math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None,
        "stderr_seeds": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        "n": n,
    }


def _correct(row: Mapping[str, Any]) -> list[int]:
    """Return which rows of all tasks are right, in order."""
    return [int(bit) for task in sorted(row["tasks"]) for bit in row["tasks"][task].get("correct", "")]


def compare_pair(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the difference of two methods over the seeds that both have; None if they share no rows.

    Returns:
        {difference, low, high, n, by_seed}: mean of the paired differences, its 95 % interval over rows, which does not
        include the variance between seeds, and the difference of each seed.
    """
    both = sorted({row["seed"] for row in one} & {row["seed"] for row in other})
    if not both:
        return None
    right = [{row["seed"]: _correct(row) for row in rows} for rows in (one, other)]
    if len({len(correct[seed]) for correct in right for seed in both}) > 1 or len(right[0][both[0]]) < 2:
        return None
    each = [[a - b for a, b in zip(right[0][seed], right[1][seed], strict=True)] for seed in both]
    differences = [statistics.mean(values) for values in zip(*each, strict=True)]
    mean, half = statistics.mean(differences), _Z * statistics.stdev(differences) / len(differences) ** 0.5
    by_seed = [statistics.mean(values) for values in each]
    nll = _nll_difference([row for row in one if row["seed"] in both], [row for row in other if row["seed"] in both])
    return {
        **{"difference": mean, "low": mean - half, "high": mean + half, "n": len(differences), "by_seed": by_seed},
        **({} if nll is None else {"nll": nll}),
    }


def _nll_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return {difference, low, high} of the NLL over the rows of all tasks, None where a row file has none."""
    found = [[_likelihoods(row) for row in rows] for rows in (one, other)]
    tokens = found[0][0][1]
    if not tokens or any(each[1] != tokens for part in found for each in part):
        return None
    means = [[statistics.mean(nats) for nats in zip(*(each[0] for each in part), strict=True)] for part in found]
    nats = [a - b for a, b in zip(*means, strict=True)]
    difference = sum(nats) / sum(tokens)
    error = ratio_error([d - difference * count for d, count in zip(nats, tokens, strict=True)], sum(tokens))
    half = _Z * (error or 0.0)
    return {"difference": difference, "low": difference - half, "high": difference + half}


def _likelihoods(row: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    """Return (nats, tokens) of the right answer to each row of all tasks, in order."""
    parts = [entry for _, task in sorted(row["tasks"].items()) for name, entry in task.items() if name.endswith("_nll")]
    return [v for part in parts for v in part["rows"]], [v for part in parts for v in part["tokens"]]
