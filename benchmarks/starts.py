"""Where quantisation-aware training should start: three starting weights, two tasks, three seeds.

    python benchmarks/starts.py MODEL_FOLDER [--steps 24] [--rows 60] [--out /tmp/starts]

For each task the model is pruned (Wanda, 50 %) and quantised (GPTQ, 4 bits, groups of 64) once; adapters are trained
from each start with the same data, ranks and steps, merged, and the merged INT4 model is evaluated. Reported: loss of
the first step (before any update), mean of the last five, and accuracy of the merged model. Finished runs are kept in
the folder and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from common import save
from sqft.pipeline import run
from sqft.recipe import DataConfig, Recipe, load_recipe

QUICKSTART = load_recipe(Path(__file__).parent.parent / "recipes" / "quickstart.yaml")
TASKS = {data.task: data for data in (QUICKSTART.data, DataConfig(task="mawps"))}
STARTS = ("compensated", "dequantized", "float")


def recipe(model: Path, task: str, start: str, seed: int, steps: int, rows: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "starts",
            "model": str(model),
            "seed": seed,
            "data": TASKS[task].model_dump(),
            "sparsify": {"calibration": {"samples": 64, "length": 128}},
            "quantize": {},
            "finetune": {
                "kind": "quantized", "start": start, "ranks": [32], "max_steps": steps, "learning_rate": 1e-3,
                "length": 256, "batch": 4,
            },
            "search": {"strategy": "maximal"},
            "verify": {"prompts": 1, "accuracy_rows": 1},
            "evaluate": {"rows": ["merged"], "limit": rows, "batch": 32},
        }
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("/tmp/sqft-starts"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, list[dict[str, float]]]] = {task: {s: [] for s in STARTS} for task in TASKS}
    for seed in range(options.seeds):
        for task in TASKS:
            for start in STARTS:
                out = options.out / f"{task.replace(':', '-')}-{start}-{seed}"
                shared = options.out / f"{task.replace(':', '-')}-{STARTS[0]}-{seed}" / "quantized"
                if start != STARTS[0] and not (out / "quantized").exists():
                    out.mkdir(parents=True, exist_ok=True)
                    (out / "quantized").symlink_to(shared.resolve())
                run(recipe(options.model, task, start, seed, options.steps, options.rows), out, lambda _: None)
                log = json.loads((out / "adapter/sqft/training_log.json").read_text())["train"]
                result = json.loads((out / "evaluations/merged.json").read_text())["tasks"][task]
                entry = {
                    "first_loss": log[0]["loss"],
                    "last_loss": statistics.mean(step["loss"] for step in log[-5:]),
                    "accuracy": result["value"],
                    "n": result["n"],
                }
                found[task][start].append(entry)
                print(task, start, seed, entry, flush=True)

    def summary(entries: list[dict[str, float]], key: str) -> dict[str, float]:
        values = [entry[key] for entry in entries]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 4), "stderr_over_seeds": round(error, 4)}

    rows = {
        task: {
            s: {key: summary(e, key) for key in ("first_loss", "last_loss", "accuracy")} for s, e in by_start.items()
        }
        for task, by_start in found.items()
    }
    save(
        "starts",
        {
            "settings": {"steps": options.steps, "rows": options.rows, "seeds": options.seeds},
            "rows": rows,
            "runs": found,
        },
    )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
