"""Where quantisation-aware training should start: three starting weights, two tasks, three seeds.

    python benchmarks/starts.py MODEL_FOLDER [--steps 24] [--rows 60] [--out /tmp/starts]

For each task the model is pruned (Wanda, 50 %) and quantised (GPTQ, 4 bits, groups of 64) once; adapters are trained
from each start with the same data, ranks and steps, merged, and the merged INT4 model is evaluated. Reported: loss of
the first step (before any update), mean of the last five, and accuracy of the merged model. Seeds that
results/starts.json holds for the same steps and rows are not run again; nor are finished stages in the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from common import ADAPTERS, RESULTS, save
from sqft.context import Context
from sqft.data.calibration import calibration_tokens
from sqft.data.load import load_examples
from sqft.model.opening import load_tokenizer
from sqft.recipe import (
    CalibrationConfig,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    MergeConfig,
    QuantizeConfig,
    SparsifyConfig,
    load_recipe,
)
from sqft.stages import evaluate, finetune, merge, quantize

QUICKSTART = load_recipe(Path(__file__).parent.parent / "recipes" / "quickstart.yaml")
TASKS = {data.task: data for data in (QUICKSTART.data, DataConfig(task="mawps"))}
RECORD = RESULTS / "starts.json"
STARTS = ("compensated", "dequantized", "float")


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
    tokenizer = load_tokenizer(options.model)
    sparse = SparsifyConfig(calibration=CalibrationConfig(samples=64, length=128))
    pairs = {}
    for task, data in TASKS.items():
        tokens = calibration_tokens(sparse.calibration, data, tokenizer, 0)
        base = options.out / task.replace(":", "-")
        base.parent.mkdir(parents=True, exist_ok=True)
        quantize.run(QuantizeConfig(), options.model, tokens, base, Context(), sparsify=sparse)
        pairs[task] = [(e.prompt, e.answer) for e in load_examples(data, "train", 0, tokenizer)]
    found: dict[str, dict[str, list[dict[str, float]]]] = {task: {s: [] for s in STARTS} for task in TASKS}
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {"settings": {}}
    if all(known["settings"].get(name) == getattr(options, name) for name in ("steps", "rows")):
        found = known["runs"]
    for seed in range(len(found["mawps"]["float"]), options.seeds):
        for task, data in TASKS.items():
            base = options.out / task.replace(":", "-")
            for start in STARTS:
                out = base.with_name(f"{base.name}-{start}-{seed}")
                config = FinetuneConfig(
                    kind="quantized", start=start, **ADAPTERS, max_steps=options.steps, learning_rate=1e-3, length=256,
                    batch=4,
                )  # fmt: skip
                adapter, merged = out / "adapter", out / "merged"
                finetune.run(config, base, pairs[task], [], adapter, Context(seed), data={"task": task})
                merge.run(MergeConfig(), base, adapter, merged, Context())
                scores = evaluate.run(
                    EvaluateConfig(limit=options.rows, batch=32), data, merged, None, out / "eval.json", Context()
                )["tasks"][task]
                log = json.loads((adapter / "sqft" / "training_log.json").read_text())["train"]
                entry = {
                    "first_loss": log[0]["loss"],
                    "last_loss": statistics.mean(step["loss"] for step in log[-5:]),
                    "accuracy": scores["value"],
                    "n": scores["n"],
                }
                found[task][start].append(entry)
                print(task, start, seed, entry, flush=True)

    def summary(entries: list[dict[str, float]], key: str) -> dict[str, float]:
        values = [entry[key] for entry in entries]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 4), "stderr_over_seeds": round(error, 4)}

    keys = ("first_loss", "last_loss", "accuracy")
    rows = {
        task: {start: {key: summary(entries, key) for key in keys} for start, entries in by_start.items()}
        for task, by_start in found.items()
    }
    settings = {"steps": options.steps, "rows": options.rows, "seeds": options.seeds}
    save("starts", {"settings": settings, "rows": rows, "runs": found})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
