"""WikiText-2 perplexity of SmolLM2: dense, our Wanda and llm-compressor's at 50 %, same calibration samples.

    python benchmarks/perplexity.py MODEL_FOLDER [--peer-python /path/to/venv/bin/python]

llm-compressor is no dependency of ours: give the interpreter of an environment that has llmcompressor 0.14 and
transformers. Perplexity is over the test text in windows of 1,024 tokens, each predicted from its own start.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from common import save
from sqft.data.calibration import calibration_tokens, perplexity_tokens
from sqft.model.checkpoint import Checkpoint
from sqft.model.load import load_model, load_tokenizer
from sqft.model.targets import find_targets
from sqft.recipe import CalibrationConfig, SparsifyConfig
from sqft.stages import sparsify

PEER = """
import sys, json, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
model_dir, tokens_file, out = sys.argv[1:]
torch.set_num_threads(2)
tokens = torch.tensor(json.load(open(tokens_file)))
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
start = time.perf_counter()
oneshot(model=model, dataset=data, recipe=WandaPruningModifier(sparsity=0.5, mask_structure="0:0", ignore=["lm_head"]),
        max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens))
json.dump({"seconds": time.perf_counter() - start}, open(out + ".json", "w"))
model.save_pretrained(out)
"""


@torch.no_grad()
def perplexity(folder: Path, tokens: torch.Tensor, window: int, limit: int | None) -> float:
    model = load_model(folder)
    rows = tokens[: len(tokens) // window * window].view(-1, window)[:limit]
    total = 0.0
    for row in rows.split(2):
        logits = model(input_ids=row).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (rows.numel() - len(rows)))


def sparsity(folder: Path) -> float:
    model = load_model(folder)
    views = [t.view(model) for t in find_targets(model)[0]]
    return sum(int((v == 0).sum()) for v in views) / sum(v.numel() for v in views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, help="test windows at most (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    config = SparsifyConfig(
        calibration=CalibrationConfig(data="wikitext2", samples=options.samples, length=options.length)
    )
    calibration = calibration_tokens(config.calibration, None, tokenizer, 0)
    text = perplexity_tokens("wikitext2", "test", tokenizer).flatten()
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models: dict[str, tuple[Path, float | None]] = {"dense": (options.model, None)}
        start = time.perf_counter()
        sparsify.run(config, options.model, calibration, folder / "ours", seed=0)
        models["sqft wanda"] = (folder / "ours", time.perf_counter() - start)
        if options.peer_python:
            (folder / "tokens.json").write_text(json.dumps(calibration.tolist()))
            (folder / "peer.py").write_text(PEER)
            command = [options.peer_python, folder / "peer.py", options.model, folder / "tokens.json", folder / "peer"]
            subprocess.run([str(part) for part in command], check=True)
            seconds = json.loads((folder / "peer.json").read_text())["seconds"]
            models["llm-compressor wanda"] = (folder / "peer", seconds)
        for name, (path, seconds) in models.items():
            rows[name] = {
                "perplexity": round(perplexity(path, text, 1024, options.windows), 3),
                "sparsity": round(sparsity(path), 4),
                "seconds": seconds and round(seconds, 1),
            }
            print(name, rows[name], flush=True)
        if "llm-compressor wanda" in models:
            ours, peer = Checkpoint(folder / "ours"), Checkpoint(folder / "peer")
            names = [
                n for n in ours.entries if n in peer.entries and ".layers." in n and len(ours.entries[n].shape) == 2
            ]
            same = sum(int(((ours.read(n) == 0) == (peer.read(n) == 0)).sum()) for n in names)
            total = sum(ours.read(n).numel() for n in names)
            rows["masks_equal"] = {"share": round(same / total, 5)}
            print(rows["masks_equal"])
    windows = options.windows or len(text) // 1024
    settings = {"samples": options.samples, "length": options.length, "test_windows": windows, "window": 1024}
    save("perplexity", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
