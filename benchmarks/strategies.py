"""What searching for ranks gives: hill climbing, random and NSGA-II at one budget, beside the points that need none.

    python benchmarks/strategies.py BASE_FOLDER ADAPTER_FOLDER --out DIR [--turns 4] [--neighbours 4] [--threads 1]

Every strategy evaluates 1 + turns x neighbours configurations, the heuristic first, on MAWPS' validation rows; what
each chose is then judged on the test rows of MAWPS and SVAMP, which no search has seen, and compared with the heuristic
on the same rows. OUT keeps the searches: run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from common import save
from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights
from sqft.adapters.saved import SavedAdapter
from sqft.context import Context
from sqft.core.climb import as_configuration
from sqft.data.load import load_tasks
from sqft.evaluation.harness import score_examples
from sqft.model.opening import load_tokenizer
from sqft.recipe import DataConfig, SearchConfig
from sqft.stages import extract

SEARCHES = ("hill_climbing", "random", "nsga2")
POINTS = ("heuristic", "maximal", "minimal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--neighbours", type=int, default=4)
    parser.add_argument("--rows", type=int, default=230, help="validation rows of a configuration")
    parser.add_argument("--test-rows", type=int, help="test rows a task (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.base)
    validation = load_tasks(DataConfig(task="mawps"), "validation", tokenizer)
    tests = [pair for task in ("mawps", "svamp") for pair in load_tasks(DataConfig(task=task), "test", tokenizer)]
    space = SavedAdapter.open(options.adapter).rank_space()

    def judge(folder: Path) -> list[bool]:
        """Return which test rows are answered right; kept beside the sub-adapter."""
        file = folder.with_suffix(".rows.json")
        if not file.is_file():
            model: Any = load_model(options.base, folder)
            with cached_weights(model):
                right = [score_examples(model, tokenizer, task, rows[: options.test_rows], 64) for task, rows in tests]
            file.write_text(json.dumps([answer for part in right for answer in part]))
        answers: list[bool] = json.loads(file.read_text())
        return answers

    rows: list[dict[str, Any]] = []
    heuristic: list[bool] = []
    for strategy in (*POINTS, *SEARCHES):
        out = options.out / strategy
        config = SearchConfig(
            strategy=strategy, turns=options.turns, neighbours=options.neighbours, samples=options.rows, batch=64
        )
        extract.run(config, options.adapter, out, Context(), base=options.base, rows=validation)
        record = json.loads((out / extract.RECORD).read_text()) if strategy in SEARCHES else None
        ranks = json.loads((out / "sqft" / "ranks.json").read_text())["ranks"]
        right = judge(out)
        heuristic = heuristic or right
        gains = [int(a) - int(b) for a, b in zip(right, heuristic, strict=True)]
        mean = sum(gains) / len(gains)
        error = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
        rows.append(
            {
                "strategy": strategy,
                "evaluated": len(record["trials"]) if record else 0,
                "validation": round(100 * record["chosen"]["accuracy"], 2) if record else None,
                "validation_of_heuristic": round(100 * record["heuristic"]["accuracy"], 2) if record else None,
                "mean_rank": round(sum(as_configuration(space, ranks)) / len(ranks), 1),
                "test": round(100 * sum(right) / len(right), 2),
                "test_minus_heuristic": [round(100 * v, 2) for v in (mean, mean - 1.96 * error, mean + 1.96 * error)],
            }
        )
        print(rows[-1], flush=True)
    save(
        "strategies",
        {
            "adapter": "/".join(options.adapter.resolve().parts[-2:]),
            "budget": 1 + options.turns * options.neighbours,
            "validation_rows": min(options.rows, len(validation[0][1])),
            "test_rows": len(heuristic),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
