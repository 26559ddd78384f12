"""What a recipe will need before it runs: disk, peak memory and time of every stage.

No formula per stage, which would rot: the recipe itself runs, in a process of its own, on two shortened copies of its
model (a few decoder blocks, random weights, the real data), and each stage's figures are drawn on to all blocks, which
is what stages are linear in. Training runs a few steps, a search a few configurations and evaluation a few rows; the
times of these, and not that of loading a model, are scaled to the recipe's. Patterns that name layers which the copies
lack are left out. A random model never ends its answers, so the time of a generated task is an upper bound.

The line assumes that blocks are alike. Where they differ (dense-first mixtures of experts, hybrids), `plan` says so.

Holds on a CPU. On a GPU the peak of the host's memory is predicted, and not the device's.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sqft.artifact import Artifact
from sqft.disk import read_json
from sqft.errors import InputError
from sqft.evaluation.prepacked import MOST_BYTES, stock_products
from sqft.model.opening import load_config
from sqft.model.targets import find_targets, skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from sqft.data.load import Data
    from sqft.recipe import EvaluateConfig, Recipe, SearchConfig

logger = logging.getLogger(__name__)

PROBE_STEPS = 3
# Blocks of the two shortened copies. A line drawn on from them magnifies their noise, so the second has more where the
# first was quick.
_BLOCKS = (2, 6)
_BLOCKS_IF_QUICK = 10
_QUICK_SECONDS = 45.0
_FOLDERS = {
    "sparse": "sparsify",
    "quantized": "quantize",
    "adapter": "finetune",
    "sub_adapter": "search",
    "merged": "merge",
}


@dataclass(frozen=True)
class Forecast:
    """What one stage will need.

    Attributes:
        stage: its name.
        disk_bytes: of what it leaves.
        memory_bytes: peak resident memory of the process, libraries included.
        seconds: wall time, on this machine as loaded as during the probe.
        fits: whether memory and disk are there.
    """

    stage: str
    disk_bytes: int
    memory_bytes: int
    seconds: float
    fits: bool


def plan(recipe: Recipe, workspace: Path, announce: Callable[[str], None] = logger.info) -> list[Forecast]:
    """Return a forecast of each stage of a recipe.

    Args:
        recipe: the recipe.
        workspace: where its run will stand; probes use a temporary folder beside it.
        announce: told each probe as it begins.

    Raises:
        InputError: the model has too few blocks to shorten, or the recipe itself cannot be used.
    """
    from transformers import AutoConfig

    from sqft.model.sources import local_folder

    workspace.mkdir(parents=True, exist_ok=True)
    model = local_folder(recipe.model, workspace, recipe.revision)
    config = AutoConfig.from_pretrained(model, trust_remote_code=recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model {recipe.model}: is quantised; a forecast needs a float model, whose copy it shortens")
    blocks: int = config.get_text_config(decoder=True).num_hidden_layers
    if blocks <= _BLOCKS[0]:
        raise InputError(f"model {recipe.model}: has {blocks} blocks, so few that a run is its own probe")
    few_blocks, many_blocks = _BLOCKS if blocks > _BLOCKS[1] else (1, blocks)
    # The copies are small enough for a layout of weights that the model may be too large for.
    whole = skeleton(model, trust_remote_code=recipe.trust_remote_code)
    linears = [module.weight for module in whole.modules() if isinstance(module, nn.Linear)]
    laid_out = 2 * sum(weight.numel() for weight in linears) <= MOST_BYTES
    if blocks_differ(whole, blocks):
        announce("its blocks are not all alike, so figures extrapolated from its first blocks may be far off")
    with tempfile.TemporaryDirectory(dir=workspace, prefix=".plan-") as temporary:

        def probe(count: int) -> dict[str, dict[str, float]]:
            announce(f"probe with {count} of {blocks} blocks")
            folder = Path(temporary) / str(count)
            _shorten(model, config, count, folder / "model", trust_remote_code=recipe.trust_remote_code)
            return _run_apart(_on_copy(recipe, model, folder / "model"), folder, laid_out=laid_out)

        started = time.monotonic()
        at_few = probe(few_blocks)
        if blocks > _BLOCKS_IF_QUICK and time.monotonic() - started < _QUICK_SECONDS:
            many_blocks = _BLOCKS_IF_QUICK
        at_many = probe(many_blocks)
    free_memory, free_disk = available_memory(), shutil.disk_usage(workspace).free
    forecasts, left = [], free_disk
    for stage in at_few:
        few, many = at_few[stage], at_many[stage]

        def at_all_blocks(key: str, few: Mapping[str, float] = few, many: Mapping[str, float] = many) -> float:
            slope = max(0.0, (many[key] - few[key]) / (many_blocks - few_blocks))  # more blocks never take less
            return few[key] + slope * (blocks - few_blocks)

        disk, memory = int(at_all_blocks("disk")), int(at_all_blocks("memory"))
        left -= disk
        fits = memory <= free_memory and left >= 0
        forecasts.append(Forecast(stage, disk, memory, round(at_all_blocks("seconds"), 1), fits))
    return forecasts


def as_json(forecasts: list[Forecast]) -> dict[str, Any]:
    """Return forecasts with their totals."""
    return {
        "stages": [asdict(forecast) for forecast in forecasts],
        "disk_bytes": sum(forecast.disk_bytes for forecast in forecasts),
        "peak_memory_bytes": max(forecast.memory_bytes for forecast in forecasts),
        "seconds": round(sum(forecast.seconds for forecast in forecasts), 1),
    }


def blocks_differ(model: nn.Module, count: int) -> bool:
    """Tell whether any of a model's `count` decoder blocks has parameters of other names or shapes than the others."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            kinds = {tuple((name, weight.shape) for name, weight in block.named_parameters()) for block in stack}
            if len(kinds) > 1:
                return True
    return False


def available_memory() -> int:
    """Return the bytes that processes may still take: the kernel's figure, or the control group's limit if lower."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(found, default=2**63)


def _shorten(model: Path, config: PretrainedConfig, count: int, folder: Path, *, trust_remote_code: bool) -> None:
    """Write a model of the same shapes with `count` blocks and random weights."""
    import copy

    from transformers import AutoModelForCausalLM

    from sqft.model.opening import quiet_transformers
    from sqft.storage.checkpoint import copy_side_files

    short = copy.deepcopy(config)
    inner = short.get_text_config(decoder=True)
    inner.num_hidden_layers = count
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:count]
    with quiet_transformers():
        made = AutoModelForCausalLM.from_config(short, dtype=config.dtype, trust_remote_code=trust_remote_code)
        made.save_pretrained(folder)
    copy_side_files(model, folder)
    short.save_pretrained(folder)


def _on_copy(recipe: Recipe, model: Path, copy: Path) -> Recipe:
    """Return the recipe without the patterns that match layers of the model and none of its shortened copy.

    Raises:
        InputError: no pattern of what to prune or quantise is left, so nothing can be drawn on from the copy.
    """
    whole, short = (skeleton(folder, trust_remote_code=recipe.trust_remote_code) for folder in (model, copy))
    values: dict[str, Any] = {"model": str(copy), "revision": None}
    for stage in ("sparsify", "quantize"):
        settings = getattr(recipe, stage)
        if settings is None:
            continue
        kept = {
            field: [
                pattern for pattern in getattr(settings, field) if _names(short, pattern) or not _names(whole, pattern)
            ]
            for field in ("targets", "ignore")
        }
        if not kept["targets"]:
            raise InputError(
                f"recipe {recipe.name}: {stage}.targets {settings.targets} name late layers alone, which a shortened "
                "model lacks; a forecast needs patterns that match layers throughout"
            )
        values[stage] = settings.model_copy(update=kept)
    return recipe.model_copy(update=values)


def _names(network: PreTrainedModel, pattern: str) -> bool:
    """Tell whether a pattern names a linear of a model's blocks."""
    try:
        return bool(find_targets(network, [pattern]))
    except InputError:
        return False


def _run_apart(recipe: Recipe, folder: Path, *, laid_out: bool) -> dict[str, dict[str, float]]:
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
    """Run a shortened recipe and send {stage: {disk, memory, seconds}}; the body of the probe's process.

    `laid_out` says whether evaluation lays out the whole model's weights anew, which takes their size once more.
    """
    from sqft import pipeline
    from sqft.context import Context
    from sqft.errors import SqftError

    logging.disable(logging.INFO)
    values: dict[str, Any] = {}
    if recipe.finetune is not None:
        values["finetune"] = recipe.finetune.model_copy(update={"max_steps": PROBE_STEPS, "evaluate_every": None})
        values["search"] = _short_search(recipe.search)
    asked: dict[str, int] = {}
    judged = 0
    try:
        data = Context(recipe.seed, recipe.trust_remote_code).data(Path(recipe.model))
        if recipe.finetune is not None and recipe.search.searches:
            rows = data.tasks(recipe.data, "validation")
            judged = sum(min(len(part), recipe.search.samples) for _, part in rows)
        if recipe.evaluate is not None:
            asked = _asked(recipe, recipe.evaluate, data)
            limit, few = recipe.evaluate.limit, recipe.evaluate.batch
            values["evaluate"] = recipe.evaluate.model_copy(update={"limit": min(limit or few, few), "baselines": []})
        with nullcontext() if laid_out else stock_products():
            pipeline.run(recipe.model_copy(update=values), out / "run")
        found = _figures(recipe, out / "run", asked, judged)
    except SqftError as error:
        sender.send(("error", str(error)))
    except Exception as error:
        logger.exception("the probe failed")
        sender.send(("error", f"the probe failed: {type(error).__name__}: {error}"))
    else:
        sender.send(("found", found))


def _asked(recipe: Recipe, config: EvaluateConfig, data: Data) -> dict[str, int]:
    """Return how many rows of each task the recipe's evaluation asks, of a text for perplexity its windows."""
    from sqft.data.tasks import PERPLEXITY
    from sqft.evaluation.perplexity import windows
    from sqft.stages import evaluate

    rows = evaluate.read_all(config, recipe.data, data, recipe.seed)
    asked = {name: len(part) for name, (_, part, _) in rows.items()}
    if PERPLEXITY.name in rows:
        assert data.tokenizer is not None
        model = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
        asked[PERPLEXITY.name] = len(windows(model, data.tokenizer, data)[: config.limit])
    return asked


def _short_search(config: SearchConfig) -> SearchConfig:
    """Return a search of three configurations on one batch of rows; what does not search is the heuristic's work."""
    if not config.searches:
        return config.model_copy(update={"strategy": "heuristic"})
    return config.model_copy(update={"turns": 1, "neighbours": 2, "samples": min(config.samples, config.batch)})


def _figures(recipe: Recipe, run: Path, asked: Mapping[str, int], judged: int) -> dict[str, dict[str, float]]:
    """Return what the probe's stages took.

    Times are scaled to the recipe's steps, to its configurations on `judged` rows each and to the rows of each task
    that it asks.
    """
    from sqft.stages import extract

    found: dict[str, dict[str, float]] = {}
    for name, stage in _FOLDERS.items():
        if not (run / name).is_dir():
            continue
        manifest = Artifact.open(run / name).manifest
        seconds = float(manifest["seconds"])
        if stage == "finetune":
            assert recipe.finetune is not None
            result = manifest["result"]
            steps = recipe.finetune.max_steps or max(
                1,
                round(
                    recipe.finetune.epochs
                    * result["packed_rows"]
                    / (recipe.finetune.batch * recipe.finetune.accumulation)
                ),
            )
            seconds += result["train_seconds"] / result["steps"] * (steps - result["steps"])
        if stage == "search" and recipe.search.searches:
            record = read_json(run / name / extract.RECORD)
            each = statistics.mean(trial["seconds"] for trial in record["trials"])
            seconds -= each * len(record["trials"])
            seconds += each * judged / sum(record["rows"].values()) * recipe.search.budget
        found[stage] = {"disk": manifest["size_bytes"], "memory": manifest["peak_memory_bytes"], "seconds": seconds}
    if (run / "verify.json").is_file():
        cost = read_json(run / "verify.json")["cost"]
        found["verify"] = {"disk": 0, "memory": cost["peak_memory_bytes"], "seconds": cost["seconds"]}
    for file in sorted((run / "evaluations").glob("*.json")):
        result = read_json(file)
        cost = result["cost"]
        further = sum(
            seconds * (asked[name] / result["tasks"][name]["n"] - 1) for name, seconds in cost["answering"].items()
        )
        found[f"evaluate {file.stem}"] = {
            "disk": 0,
            "memory": cost["peak_memory_bytes"],
            "seconds": cost["seconds"] + further,
        }
    return found
