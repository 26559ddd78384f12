"""What `sqft plan` forecasts against what `sqft run` takes: the quickstart, and a random Llama of 1.2 B parameters.

    python benchmarks/plan.py [--threads 2] [--only quickstart]

The large model has the quickstart's recipe, every stage of it, with few calibration samples, steps and rows: memory and
disk do not depend on how long a stage goes on. Seconds are kept too; they say something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from common import RESULTS, save
from memory import write_llama
from sqft.model.sources import local_folder

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
FOLDERS = {"quantize": "quantized", "finetune": "adapter", "search": "sub_adapter", "merge": "merged"}


def write_recipes(at: Path) -> dict[str, Path]:
    """Write both recipes, without the figures of earlier runs that they show beside."""
    small = yaml.safe_load(QUICKSTART.read_text())
    del small["evaluate"]["baselines"]
    write_llama(at / "llama", local_folder(small["model"], at))
    large = json.loads(json.dumps(small)) | {"name": "large", "model": str(at / "llama")}
    large["data"]["options"] |= {"train_size": 200, "test_size": 8}
    large["sparsify"]["calibration"]["samples"] = 16
    large["finetune"] |= {"max_steps": 4}
    large["verify"] = {"prompts": 4, "accuracy_rows": 4}
    large["evaluate"] = {"rows": ["dense", "quantized", "merged"], "batch": 8}
    found = {}
    for name, recipe in (("quickstart", small), ("random Llama, 1.2 B", large)):
        found[name] = at / f"{recipe['name']}.yaml"
        found[name].write_text(yaml.safe_dump(recipe))
    return found


def taken(run: Path) -> dict[str, dict[str, float]]:
    """Return {stage: what it took} from what a run left."""

    def figures(cost: dict[str, Any], disk: int) -> dict[str, float]:
        return {"disk_bytes": disk, "memory_bytes": cost["peak_memory_bytes"], "seconds": cost["seconds"]}

    found = {}
    for stage, folder in FOLDERS.items():
        manifest = json.loads((run / folder / "sqft" / "manifest.json").read_text())
        found[stage] = figures(manifest, manifest["size_bytes"])
    found["verify"] = figures(json.loads((run / "verify.json").read_text())["cost"], 0)
    for file in (run / "evaluations").glob("*.json"):
        found[f"evaluate {file.stem}"] = figures(json.loads(file.read_text())["cost"], 0)
    return found


def measure(recipe: Path, threads: int) -> list[dict[str, Any]]:
    run = recipe.with_suffix("")
    command = [sys.executable, "-m", "sqft"]
    options = [str(recipe), "--out", str(run), "--threads", str(threads)]
    plan = subprocess.run([*command, "plan", *options, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    subprocess.run([*command, "run", *options], check=True, stdout=subprocess.DEVNULL)
    actual = taken(run)
    return [
        {"stage": forecast["stage"], "forecast": forecast, "taken": actual[forecast["stage"]]}
        for forecast in json.loads(plan.stdout)["stages"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="one of the two, by the beginning of its name; the other's stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        recipes = write_recipes(Path(temporary))
        models = {
            name: measure(recipe, options.threads) for name, recipe in recipes.items() if name.startswith(options.only)
        }
    for name, rows in models.items():
        for row in rows:
            ratios = {
                key: round(row["forecast"][key] / row["taken"][key], 3)
                for key in ("disk_bytes", "memory_bytes", "seconds")
                if row["taken"][key]
            }
            print(f"{name}: {row['stage']}: {row['taken']['memory_bytes'] / 1e9:.2f} GB, forecast / taken {ratios}")
    file = RESULTS / "plan.json"
    before = json.loads(file.read_text())["models"] if options.only and file.is_file() else {}
    save("plan", {"models": before | models})


if __name__ == "__main__":
    main()
