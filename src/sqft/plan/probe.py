"""A probe: a shortened recipe runs in a separate process, and its figures are scaled to the full recipe."""

from __future__ import annotations

import logging
import multiprocessing
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifact import Artifact
from sqft.disk import read_json
from sqft.errors import InputError
from sqft.evaluation.prepacked import stock_products
from sqft.model.opening import load_config

if TYPE_CHECKING:
    from sqft.data.load import Data
    from sqft.recipe import EvaluateConfig, FinetuneConfig, Recipe, SearchConfig

logger = logging.getLogger(__name__)

PROBE_STEPS = 3
_FOLDERS = {
    "teacher_adapter": "finetune the teacher",
    "teacher": "teacher",
    "sparse": "sparsify",
    "quantized": "quantize",
    "adapter": "finetune",
    "sub_adapter": "search",
    "merged": "merge",
}


def run_apart(recipe: Recipe, folder: Path, *, laid_out: bool) -> dict[str, dict[str, float]]:
    """Run the probe in a fresh process, so that its peak memory is that of a run, and return its figures."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(recipe, folder, sender, laid_out))
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError as error:
        process.join()
        code = process.exitcode or 0
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise InputError(
            f"the probe was ended by {ended}; is there too little memory for even a few blocks?"
        ) from error
    process.join()
    if kind == "error":
        raise InputError(str(value))
    return dict(value)


def _probe(recipe: Recipe, out: Path, sender: Any, laid_out: bool) -> None:
    """Run a shortened recipe and send {stage: {disk, memory, gpu, seconds}}; the body of the probe's process.

    `laid_out` says whether evaluation of the full model prepacks its weights, which takes their size once more.
    """
    from sqft import pipeline
    from sqft.context import Context
    from sqft.errors import SqftError

    logging.disable(logging.INFO)
    values: dict[str, Any] = {}
    if recipe.finetune is not None:
        values["finetune"] = recipe.finetune.model_copy(update={"max_steps": PROBE_STEPS, "evaluate_every": None})
        values["search"] = _short_search(recipe.search)
    if recipe.teacher is not None and recipe.teacher.training is not None:
        values["teacher"] = recipe.teacher.model_copy(update={"max_steps": PROBE_STEPS, "evaluate_every": None})
    counts: dict[str, int] = {}
    judged = 0
    try:
        data = Context(recipe.seed, recipe.trust_remote_code, recipe.device).data(Path(recipe.model))
        if recipe.finetune is not None and recipe.search.searches:
            rows = data.tasks(recipe.data, "validation")
            judged = sum(min(len(part), recipe.search.samples) for _, part in rows)
        if recipe.evaluate is not None:
            counts = rows_of(recipe, recipe.evaluate, data)
            limit, few = recipe.evaluate.limit, recipe.evaluate.batch
            values["evaluate"] = recipe.evaluate.model_copy(update={"limit": min(limit or few, few), "baselines": []})
        with nullcontext() if laid_out else stock_products():
            pipeline.run(recipe.model_copy(update=values), out / "run")
        found = _figures(recipe, out / "run", counts, judged)
    except SqftError as error:
        sender.send(("error", str(error)))
    except Exception as error:
        logger.exception("the probe failed")
        sender.send(("error", f"the probe failed: {type(error).__name__}: {error}"))
    else:
        sender.send(("found", found))


def rows_of(recipe: Recipe, config: EvaluateConfig, data: Data) -> dict[str, int]:
    """Return how many rows of each task the recipe evaluates; for perplexity, how many windows."""
    from sqft.data.tasks import PERPLEXITY
    from sqft.evaluation.perplexity import windows
    from sqft.stages import evaluate

    rows = evaluate.read_all(config, recipe.data, data, recipe.seed)
    counts = {name: len(part) for name, (_, part, _) in rows.items()}
    if PERPLEXITY.name in rows:
        assert data.tokenizer is not None
        model = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
        counts[PERPLEXITY.name] = len(windows(model, data.tokenizer, data)[: config.limit])
    return counts


def _short_search(config: SearchConfig) -> SearchConfig:
    """Return a search of three configurations on one batch of rows; other strategies are replaced by the heuristic."""
    if not config.searches:
        return config.model_copy(update={"strategy": "heuristic"})
    return config.model_copy(update={"turns": 1, "neighbours": 2, "samples": min(config.samples, config.batch)})


def _figures(recipe: Recipe, run: Path, evaluated: Mapping[str, int], judged: int) -> dict[str, dict[str, float]]:
    """Return disk, memory and seconds of the probe's stages.

    Times are scaled to the recipe's steps, to its configurations on `judged` rows each, and to its evaluated rows of
    each task.
    """
    from sqft.stages import extract

    found: dict[str, dict[str, float]] = {}
    for name, stage in _FOLDERS.items():
        if not (run / name).is_dir():
            continue
        manifest = Artifact.open(run / name).manifest
        seconds = float(manifest["seconds"])
        if name == "adapter" and recipe.finetune is not None:
            seconds += _further_seconds(recipe.finetune, manifest["result"])
        if name == "teacher_adapter" and recipe.teacher is not None and recipe.teacher.training is not None:
            seconds += _further_seconds(recipe.teacher.training, manifest["result"])
        if stage == "search" and recipe.search.searches:
            record = read_json(run / name / extract.RECORD)
            each = statistics.mean(trial["seconds"] for trial in record["trials"])
            seconds -= each * len(record["trials"])
            seconds += each * judged / sum(record["rows"].values()) * recipe.search.budget
        found[stage] = _figure(manifest["size_bytes"], manifest, seconds)
    if (run / "verify.json").is_file():
        cost = read_json(run / "verify.json")["cost"]
        found["verify"] = _figure(0, cost, cost["seconds"])
    for file in sorted((run / "evaluations").glob("*.json")):
        result = read_json(file)
        cost = result["cost"]
        further = sum(
            seconds * (evaluated[name] / result["tasks"][name]["n"] - 1) for name, seconds in cost["answering"].items()
        )
        found[f"evaluate {file.stem}"] = _figure(0, cost, cost["seconds"] + further)
    return found


def _figure(disk: int, cost: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Return a stage's figures; `gpu` is 0 where none was used."""
    gpu = cost.get("peak_gpu_bytes", 0)
    return {"disk": disk, "memory": cost["peak_memory_bytes"], "gpu": gpu, "seconds": seconds}


def _further_seconds(config: FinetuneConfig, result: Mapping[str, Any]) -> float:
    """Return what a training takes beyond the few steps that a probe took."""
    epoch = result["packed_rows"] / (config.batch * config.accumulation)
    steps = config.max_steps or max(1, round(config.epochs * epoch))
    return float(result["train_seconds"] / result["steps"] * (steps - result["steps"]))
