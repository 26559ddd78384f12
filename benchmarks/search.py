"""How many configurations of an elastic adapter are judged in an hour: in place, against the reference's way.

    python benchmarks/search.py BASE_FOLDER ADAPTER_FOLDER [--task mawps] [--rows 50] [--configurations 3] [--threads 2]

The reference's way loads base and sub-adapter for every configuration and runs lm-eval with its own Hugging Face
model. Ours loads once, switches the ranks, and makes anew what changed. Both judge the same configurations, neighbours
of the heuristic, on the same validation rows; they alternate, configuration by configuration. The load that ours does
once is counted apart, and the reference is also given as if it kept the base in memory and loaded the adapter alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import save
from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights, switch_ranks
from sqft.adapters.saved import SavedAdapter, write_sub_adapter
from sqft.core.climb import as_configuration, sample_neighbours
from sqft.data.load import load_tasks
from sqft.evaluation import harness
from sqft.model.opening import load_tokenizer
from sqft.recipe import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--task", default="mawps")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--configurations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.base)
    ((task, examples),) = load_tasks(DataConfig(task=options.task), "validation", tokenizer)
    examples = examples[: options.rows]
    saved = SavedAdapter.open(options.adapter)
    space = saved.rank_space()
    anchor = as_configuration(space, space.heuristic())
    drawn = sample_neighbours(space, anchor, options.configurations, 8, {anchor}, random.Random(0))
    configurations = [dict(zip(space.groups, configuration, strict=True)) for configuration in drawn]
    ours = harness._language_model()
    from lm_eval.models.huggingface import HFLM

    class Stock(HFLM):
        shortened = 0

    def reference(ranks: dict[str, int]) -> list[bool]:
        harness._language_model = lambda: Stock
        with tempfile.TemporaryDirectory() as temporary:
            write_sub_adapter(saved, space.per_module(ranks), Path(temporary))
            (Path(temporary) / "sqft").mkdir()
            for name in ("manifest.json",):
                source = options.adapter / "sqft" / name
                (Path(temporary) / "sqft" / name).write_bytes(source.read_bytes())
            start = time.perf_counter()
            load_model(options.base)
            base_seconds.append(time.perf_counter() - start)
            model: Any = load_model(options.base, Path(temporary))
            return harness.score_examples(model, tokenizer, task, examples, options.batch)

    start = time.perf_counter()
    live: Any = load_model(options.base, options.adapter, elastic=True)
    load_seconds = time.perf_counter() - start
    base_seconds: list[float] = []
    seconds: dict[str, list[float]] = {"reference": [], "sqft": []}
    alike = 0
    with cached_weights(live):
        for ranks in configurations:
            start = time.perf_counter()
            theirs = reference(ranks)
            seconds["reference"].append(time.perf_counter() - start - base_seconds[-1])
            harness._language_model = lambda: ours
            start = time.perf_counter()
            switch_ranks(live, space.per_module(ranks))
            mine = harness.score_examples(live, tokenizer, task, examples, options.batch)
            seconds["sqft"].append(time.perf_counter() - start)
            alike += sum(a == b for a, b in zip(theirs, mine, strict=True))
            print(ranks and {k: round(v[-1], 1) for k, v in seconds.items()}, sum(theirs), sum(mine), flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base_kept = medians["reference"] - statistics.median(base_seconds)
    save(
        "search",
        {
            "task": options.task, "rows": len(examples), "configurations": len(configurations), "kind": saved.kind,
            "seconds_per_configuration": {name: round(value, 2) for name, value in medians.items()},
            "configurations_per_hour": {name: round(3600 / value) for name, value in medians.items()},
            "speed_up": round(medians["reference"] / medians["sqft"], 2),
            "speed_up_if_the_reference_kept_the_base": round(base_kept / medians["sqft"], 2),
            "load_seconds_once": round(load_seconds, 2),
            "rows_judged_alike": f"{alike} of {len(examples) * len(configurations)}",
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
