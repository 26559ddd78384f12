"""A forecast of the disk, peak memory and time of every stage, before a recipe runs.

There is no formula per stage, which would go out of date. The recipe runs in a separate process on two shortened copies
of its model (a few decoder blocks, random weights, the real data). Each stage's figures are extrapolated linearly in
the number of blocks. Training runs a few steps, a search a few configurations and evaluation a few rows; these times,
without loading a model, are scaled to the recipe's. Patterns for layers that the copies lack are left out. A random
model never ends its answers, so the time of a generated task is an upper bound.

The extrapolation assumes that blocks are alike. If they differ (dense-first mixtures of experts, hybrids), `plan` says
so. On a GPU it predicts what tensors take there as well; the probes run on it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sqft.device import free_bytes, resolve
from sqft.errors import InputError
from sqft.evaluation.prepacked import fit
from sqft.model.targets import skeleton
from sqft.plan.copies import on_copy, shorten
from sqft.plan.probe import run_apart

if TYPE_CHECKING:
    from sqft.recipe import Recipe

logger = logging.getLogger(__name__)

# Blocks of the two shortened copies. Extrapolation amplifies noise, so the second has more blocks if the first was
# quick.
_BLOCKS = (2, 6)
_BLOCKS_IF_QUICK = 10
_QUICK_SECONDS = 45.0


@dataclass(frozen=True)
class Forecast:
    """The resources that one stage needs.

    Attributes:
        stage: its name.
        disk_bytes: size of its output.
        memory_bytes: peak resident memory of the process, libraries included.
        gpu_bytes: the most that tensors take on the card; 0 where none is used.
        seconds: wall time on this machine, under the same load as during the probe.
        fits: whether there is enough memory, on the card too, and disk.
    """

    stage: str
    disk_bytes: int
    memory_bytes: int
    gpu_bytes: int
    seconds: float
    fits: bool


def plan(recipe: Recipe, workspace: Path, announce: Callable[[str], None] = logger.info) -> list[Forecast]:
    """Return a forecast of each stage of a recipe.

    Args:
        recipe: the recipe.
        workspace: the folder of the run; probes use a temporary folder inside it.
        announce: called with each probe as it starts.

    Raises:
        InputError: the model is quantised or has too few blocks to shorten, or the recipe is not valid.
    """
    from transformers import AutoConfig

    from sqft.model.sources import local_folder
    from sqft.stages import teacher

    workspace.mkdir(parents=True, exist_ok=True)
    model = local_folder(recipe.model, workspace, recipe.revision)
    given = teacher.locate(recipe.teacher, workspace)
    config = AutoConfig.from_pretrained(model, trust_remote_code=recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model {recipe.model}: is quantised; a forecast needs a float model, whose copy it shortens")
    blocks: int = config.get_text_config(decoder=True).num_hidden_layers
    if blocks <= _BLOCKS[0]:
        raise InputError(f"model {recipe.model}: has {blocks} blocks, so few that a run is its own probe")
    few_blocks, many_blocks = _BLOCKS if blocks > _BLOCKS[1] else (1, blocks)
    # The copies are small enough for prepacked weights; the model may be too large for them.
    whole = skeleton(model, trust_remote_code=recipe.trust_remote_code)
    laid_out = fit(module.weight for module in whole.modules() if isinstance(module, nn.Linear))
    if blocks_differ(whole, blocks):
        announce("its blocks are not all alike, so figures extrapolated from its first blocks may be far off")
    free = free_bytes(resolve(recipe.device))
    free_gpu = float("inf") if free is None else free
    with tempfile.TemporaryDirectory(dir=workspace, prefix=".plan-") as temporary:

        def probe(count: int) -> dict[str, dict[str, float]]:
            announce(f"probe with {count} of {blocks} blocks")
            folder = Path(temporary) / str(count)
            shorten(model, config, count, folder / "model", trust_remote_code=recipe.trust_remote_code)
            return run_apart(on_copy(recipe, model, folder / "model", given), folder, laid_out=laid_out)

        started = time.monotonic()
        at_few = probe(few_blocks)
        if blocks > _BLOCKS_IF_QUICK and time.monotonic() - started < _QUICK_SECONDS:
            many_blocks = _BLOCKS_IF_QUICK
        at_many = probe(many_blocks)
    return _extrapolated(
        at_few, at_many, (few_blocks, many_blocks, blocks), shutil.disk_usage(workspace).free, free_gpu
    )


def _extrapolated(
    at_few: dict[str, dict[str, float]],
    at_many: dict[str, dict[str, float]],
    counts: tuple[int, int, int],
    free_disk: int,
    free_gpu: float,
) -> list[Forecast]:
    """Return forecasts from the figures of two probes; `counts` are their blocks and the model's."""
    few_blocks, many_blocks, blocks = counts
    free_memory = available_memory()
    forecasts, left = [], free_disk
    for stage in at_few:
        few, many = at_few[stage], at_many[stage]

        def at_all_blocks(key: str, few: Mapping[str, float] = few, many: Mapping[str, float] = many) -> float:
            slope = max(0.0, (many[key] - few[key]) / (many_blocks - few_blocks))  # more blocks never take less
            return few[key] + slope * (blocks - few_blocks)

        disk, memory, gpu = (int(at_all_blocks(key)) for key in ("disk", "memory", "gpu"))
        left -= disk
        fits = memory <= free_memory and left >= 0 and gpu <= free_gpu
        forecasts.append(Forecast(stage, disk, memory, gpu, round(at_all_blocks("seconds"), 1), fits))
    return forecasts


def as_json(forecasts: list[Forecast]) -> dict[str, Any]:
    """Return forecasts with their totals."""
    return {
        "stages": [asdict(forecast) for forecast in forecasts],
        "disk_bytes": sum(forecast.disk_bytes for forecast in forecasts),
        "peak_memory_bytes": max(forecast.memory_bytes for forecast in forecasts),
        "peak_gpu_bytes": max(forecast.gpu_bytes for forecast in forecasts),
        "seconds": round(sum(forecast.seconds for forecast in forecasts), 1),
    }


def blocks_differ(model: nn.Module, count: int) -> bool:
    """Return whether a model's `count` decoder blocks differ in names or shapes of parameters."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            kinds = {tuple((name, weight.shape) for name, weight in block.named_parameters()) for block in stack}
            if len(kinds) > 1:
                return True
    return False


def available_memory() -> int:
    """Return the available memory in bytes: the kernel's figure, or what the control group's limit leaves if lower."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(found, default=2**63)
