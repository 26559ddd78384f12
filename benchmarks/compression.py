"""Pruning and quantising SmolLM2: time, zeros kept and WikiText-2 perplexity, beside llm-compressor.

    python benchmarks/compression.py MODEL_FOLDER [--peer-python /path/to/venv/bin/python] [--windows 40]

All rows see the same calibration tokens. llm-compressor is no dependency of ours: give the interpreter of an
environment that has llmcompressor 0.14 and transformers. Perplexity is over the test text in windows of 1,024 tokens,
each predicted from its own start. Two rows are ours with one thing changed, for an equal comparison: `mask ignored`
lets the error feedback bring zeros back, as the peer does; `feedback forgotten` sets pruned weights back to zero and
drops what they had received. Time is the whole call, from a folder to a folder. llm-compressor's Wanda also prunes the
tied embedding, whatever is ignored; it is put back, so that the rows differ in the linears alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sqft.core.gptq as gptq_module
from common import save
from sqft.adapters.attach import load_model
from sqft.context import Context
from sqft.core.gptq import Quantized, _QuantizingLoop, gptq
from sqft.data.calibration import calibration_tokens, perplexity_tokens
from sqft.model.opening import load_tokenizer
from sqft.model.targets import find_targets
from sqft.recipe import CalibrationConfig, QuantizeConfig, SparsifyConfig
from sqft.stages import quantize, sparsify

PEER = """
import sys, json, time
start = time.perf_counter()
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
try:
    from llmcompressor.modifiers.gptq import GPTQModifier
except ImportError:
    from llmcompressor.modifiers.quantization import GPTQModifier
model_dir, tokens_file, out, joint, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokens = torch.tensor(json.load(open(tokens_file)))
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
recipe = [WandaPruningModifier(sparsity=0.5, mask_structure="0:0", ignore=["lm_head"])]
if joint == "joint":
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe.append(GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]))
embedding = model.get_input_embeddings().weight.data.clone()
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=tokens.shape[1], num_calibration_samples=len(tokens))
# Wanda prunes the head although it is ignored, and with it the embedding that it is tied to.
model.get_input_embeddings().weight.data.copy_(embedding)
model.save_pretrained(out)
json.dump({"seconds": time.perf_counter() - start}, open(out + ".json", "w"))
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


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Return where each linear in the blocks is zero, dequantised if need be."""
    model = load_model(folder)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]))  # transformers decompresses on the first forward
    return {t.name: t.view(model) == 0 for t in find_targets(model)[0]}


def share(masks: dict[str, torch.Tensor]) -> float:
    return sum(int(m.count_nonzero()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def kept(after: dict[str, torch.Tensor], pruned: dict[str, torch.Tensor]) -> float:
    """Return the share of the pruned weights of the first block that are still zero.

    Its masks do not depend on what was done to blocks before, so they are known without the peer's help.
    """
    first = [name for name in pruned if ".layers.0." in name]
    still = sum(int((after[name] & pruned[name]).count_nonzero()) for name in first)
    return still / sum(int(pruned[name].count_nonzero()) for name in first)


def mask_ignored(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, **options: Any) -> Quantized:
    return gptq(weight * mask, hessian, None, **options)


class _Forgetful(_QuantizingLoop):
    """Sets what a pruned weight had received to nothing before its error is taken."""

    def _settle(self, index: int) -> None:
        if self.kept_IO is not None:
            self.work_IO[index].mul_(self.kept_IO[self.order[index]])
        super()._settle(index)


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
    sparse = SparsifyConfig(
        calibration=CalibrationConfig(data="wikitext2", samples=options.samples, length=options.length)
    )
    tokens = calibration_tokens(sparse.calibration, None, tokenizer, 0)
    text = perplexity_tokens("wikitext2", "test", tokenizer).flatten()
    rows: dict[str, dict[str, Any]] = {}
    masks: dict[str, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
        (folder / "peer.py").write_text(PEER)

        def joint(out: Path) -> None:
            quantize.run(QuantizeConfig(), options.model, tokens, out, Context(), sparsify=sparse)

        def without_mask(out: Path) -> None:
            quantize.gptq = mask_ignored
            joint(out)
            quantize.gptq = gptq

        def forgetful(out: Path) -> None:
            gptq_module._QuantizingLoop = _Forgetful  # type: ignore[misc]
            joint(out)
            gptq_module._QuantizingLoop = _QuantizingLoop  # type: ignore[misc]

        def peer(kind: str) -> Callable[[Path], None]:
            def run(out: Path) -> None:
                arguments = [options.model, folder / "tokens.json", out, kind, options.threads]
                command = [str(part) for part in (options.peer_python, folder / "peer.py", *arguments)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

            return run

        work: dict[str, Callable[[Path], Any]] = {
            "sqft wanda": lambda out: sparsify.run(sparse, options.model, tokens, out, Context()),
            "sqft wanda + gptq": joint,
            "sqft, mask ignored": without_mask,
            "sqft, feedback forgotten": forgetful,
        }
        if options.peer_python:
            work = {
                "sqft wanda": work["sqft wanda"],
                "llm-compressor wanda": peer("wanda"),
                "sqft wanda + gptq": joint,
                "llm-compressor wanda + gptq": peer("joint"),
                **{name: action for name, action in work.items() if "," in name},
            }
        rows["dense"] = {"perplexity": round(perplexity(options.model, text, 1024, options.windows), 3)}
        print("dense", rows["dense"], flush=True)
        for name, action in work.items():
            out = folder / name.replace(" ", "-").replace(",", "")
            start = time.perf_counter()
            action(out)
            seconds = time.perf_counter() - start
            masks[name] = zeros(out)
            pruned = masks.get("llm-compressor wanda") if name.startswith("llm") else masks["sqft wanda"]
            rows[name] = {
                "seconds": round(seconds, 1),
                "sparsity": round(share(masks[name]), 4),
                "zeros_kept_first_block": pruned and round(kept(masks[name], pruned), 4),
                "perplexity": round(perplexity(out, text, 1024, options.windows), 3),
            }
            print(name, rows[name], flush=True)
    result: dict[str, Any] = {
        "settings": {
            "samples": options.samples,
            "length": options.length,
            "test_windows": options.windows or len(text) // 1024,
            "window": 1024,
        },
        "rows": rows,
    }
    if "llm-compressor wanda" in masks:
        ours, theirs = masks["sqft wanda"], masks["llm-compressor wanda"]
        equal = {name: float((ours[name] == theirs[name]).float().mean()) for name in ours}
        weights = {name: mask.numel() for name, mask in ours.items()}
        result["wanda_masks_equal"] = {
            "share": round(sum(equal[n] * weights[n] for n in equal) / sum(weights.values()), 5),
            "least": {name: round(equal[name], 4) for name in sorted(equal, key=equal.__getitem__)[:5]},
        }
        result["joint_seconds_to_peer"] = round(
            rows["sqft wanda + gptq"]["seconds"] / rows["llm-compressor wanda + gptq"]["seconds"], 3
        )
        print(result["wanda_masks_equal"], result["joint_seconds_to_peer"])
    save("compression", result)


if __name__ == "__main__":
    main()
