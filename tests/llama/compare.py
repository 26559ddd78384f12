"""Export a quantised model, run it in llama.cpp and hold it against transformers in float32.

    python tests/llama/compare.py MODEL_DIR [--prompts 8] [--max-tokens 32] [--out FILE.json]

llama.cpp comes in the wheel of cyllama, put by pip into a cache folder at the first run. Compared are the tokens of a
corpus (they must be equal), greedy answers, the loss of a text, and the mean KL divergence over its tokens. The weights
are the same to the bit, so what differs is llama.cpp's arithmetic: it rounds activations to 8 bits. Exit code: 0 when
all tokens are equal, greedy answers differ at near ties only and the losses are within 0.02; else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sqft

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from serve_vllm import NEAR_TIE, PROMPTS

REQUIREMENTS = ("cyllama==0.2.18", "numpy==2.4.6")
MOST_LOSS = 0.02
TRICKY = [
    "3 33 333 3333 3.14 1,000,000 2024-05-17",
    "a  b   c\td\n\ne\r\nf   ",
    "x = 5  # a comment\n\tif x:\n\t\treturn [1,2 ,3]",
    "I've told he's there, we'll see; DON'T.",
    "naïve café Ελληνικά Русский 中文 日本語 한국어 العربية",
    "😀 👩‍👩‍👧 🇫🇷 ½ ① ﬁ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "".join(map(chr, range(32, 127))),
]


def llama_cpp() -> Path:
    """Return the folder with llama.cpp's Python binding, installed where it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sqft" / f"{REQUIREMENTS[0].replace('==', '-')}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not folder.is_dir():
        print(f"installing {REQUIREMENTS[0]} into {folder} (once)", flush=True)
        partial = folder.with_name(f"{folder.name}.partial")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", partial]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        partial.rename(folder)
    return folder


def run_llama(file: Path, job: dict[str, Any]) -> dict[str, Any]:
    folder = llama_cpp()
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch, "job.json"), Path(scratch, "result.json")
        arrays = Path(scratch, "log_probabilities.npy")
        given.write_text(json.dumps({**job, "log_probabilities": str(arrays)}))
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        script = Path(__file__).with_name("llama.py")
        subprocess.run([sys.executable, script, file, given, result], env=environment, check=True)
        found = json.loads(result.read_text())
        return found | ({"log_probabilities": torch.from_numpy(np.load(arrays))} if job["text"] else {})


class Reference:
    """transformers, the weights dequantised to float32, where s · (q − z) is exact."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([tokens])).logits[0].double()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return made[0, len(prompt) :].tolist()

    def distance(self, tokens: list[int], theirs: torch.Tensor) -> dict[str, float]:
        """Return both losses of a text and the mean KL divergence, from log-probabilities [T - 1, vocabulary]."""
        ours, given = self.logits(tokens)[:-1].log_softmax(-1), theirs.double()
        right = torch.tensor(tokens[1:])[:, None]
        return {
            "loss_tokens": len(right),
            "loss_transformers": float(-ours.gather(1, right).mean()),
            "loss_llama_cpp": float(-given.gather(1, right).mean()),
            "kl": float((ours.exp() * (ours - given)).sum(-1).mean()),
        }

    def gap(self, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
        """Return by how much transformers prefers its token where llama.cpp first takes another one; 0 if nowhere."""
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if at is None:
            return 0.0
        logits = self.logits(prompt + ours[:at])[-1]
        return float(logits.max() - logits[theirs[at]])


def compare(folder: Path, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    proof = sqft.export(folder, file, converter=options.converter)
    seconds = time.perf_counter() - start
    reference = Reference(folder)
    texts = [*PROMPTS, *TRICKY]
    prompts = [reference.tokens(prompt) for prompt in PROMPTS[: options.prompts]]
    text = reference.tokens("\n\n".join(PROMPTS))
    job = {"texts": texts, "prompts": prompts, "text": text, "count": options.max_tokens}
    found = run_llama(file, {**job, "threads": torch.get_num_threads()})
    differ = [t for t, tokens in zip(texts, found["tokens"], strict=True) if tokens != reference.tokens(t)]
    answers = [reference.greedy(prompt, options.max_tokens) for prompt in prompts]
    gaps = [reference.gap(*row) for row in zip(prompts, answers, found["greedy"], strict=True)]
    return {
        "model": folder.name, "export_s": round(seconds, 1), **proof,
        "texts": len(texts), "texts_with_other_tokens": differ,
        "greedy": len(gaps), "greedy_equal": sum(gap == 0 for gap in gaps), "largest_gap": max(gaps),
        **reference.distance(text, found["log_probabilities"]),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--prompts", type=int, default=8, help="prompts answered greedily (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--converter", type=Path, help="as of sqft export")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = compare(options.model, Path(scratch, "model.gguf"), options)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    apart = abs(result["loss_transformers"] - result["loss_llama_cpp"])
    return int(bool(result["texts_with_other_tokens"]) or result["largest_gap"] > NEAR_TIE or apart > MOST_LOSS)


if __name__ == "__main__":
    sys.exit(main())
