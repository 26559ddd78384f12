"""Run the quickstart's dense + LoRA baseline and keep its result as a labelled baseline row.

python benchmarks/quickstart_baseline.py
"""

from __future__ import annotations

import json
from pathlib import Path

from common import RESULTS, machine
from sqft.pipeline import run
from sqft.recipe import load_recipe

ROOT = Path(__file__).parent.parent


def main() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart-dense-lora.yaml")
    result = run(recipe, ROOT / "runs" / recipe.name, print)
    tuned = json.loads((result.out / "evaluations" / "tuned.json").read_text())
    baseline = {
        "label": "dense + LoRA",
        "note": "dense model, LoRA of rank 32, unmerged; recipes/quickstart-dense-lora.yaml",
        "tasks": tuned["tasks"],
        "precision": "bfloat16 + float32 adapter",
        "seed": tuned["seed"],
        "machine": machine(),
    }
    (RESULTS / "quickstart_dense_lora.json").write_text(json.dumps(baseline, indent=2) + "\n")


if __name__ == "__main__":
    main()
