"""What fine-tuning holds in memory: an INT4 base against the 16-bit one, on SmolLM2 and on a random Llama of 1.2 B.

    python benchmarks/memory.py MODEL_FOLDER [--threads 2] [--steps 2]

The command `sqft finetune` itself, each in a process of its own: 50 % sparse base in bfloat16 or INT4 (rounded, groups
of 64), rank 32 on q, k, v, up and down, micro-batches of 2 × 256 tokens. `peak` is the highest resident memory of that
process, libraries and all; `libraries` is what it holds before the model. The model's folder lends its tokenizer to the
random one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ADAPTERS, save

RUNS = {
    "LoRA on 16 bit": ("sparse", "dense"),
    "LoRA on INT4 (SQFT)": ("int4", "dense"),
    "SparsePEFT on 16 bit": ("sparse", "sparse"),
    "QA-SparsePEFT on INT4": ("int4", "quantized"),
}


def one(base: str, kind: str, out: str, steps: int, threads: int) -> None:
    """Fine-tune for a few steps and print what it held; the body of a process."""
    import torch

    from sqft.adapters.attach import load_model
    from sqft.context import Context
    from sqft.memory import begin_peak, peak_memory_bytes
    from sqft.recipe import FinetuneConfig
    from sqft.stages import finetune, merge  # noqa: F401
    from training import packed_share, resident

    torch.set_num_threads(threads)
    begin_peak()
    libraries = peak_memory_bytes()
    pairs = [(f"{a} plus {b} makes", f" {a + b}") for a in range(40) for b in range(40)]
    config = FinetuneConfig.model_validate(
        {**ADAPTERS, "kind": kind, "max_steps": steps, "length": 256, "batch": 2, "attention": "eager"}
    )
    artifact = finetune.run(config, Path(base), pairs, [], Path(out), Context(), data={})
    found = {"peak": artifact.manifest["peak_memory_bytes"], "libraries": libraries}
    model = load_model(Path(base), packed=True)
    found["model"] = resident(model)
    if any(type(module).__name__ == "PackedLinear" for module in model.modules()):
        found["packed_share"] = packed_share(model)
    print(json.dumps(found))


def write_llama(folder: Path, like: Path) -> None:
    """Write a random Llama of 1.2 B parameters with another model's tokenizer."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=AutoConfig.from_pretrained(like).vocab_size, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in like.glob("*token*"):
        shutil.copy(file, folder)


def measure(model: Path, at: Path, steps: int, threads: int) -> list[dict[str, Any]]:
    from sqft.context import Context
    from sqft.recipe import QuantizeConfig, SparsifyConfig
    from sqft.stages import quantize, sparsify

    sparsify.run(SparsifyConfig(method="magnitude"), model, None, at / "sparse", Context())
    quantize.run(QuantizeConfig(method="rtn"), at / "sparse", None, at / "int4", Context())
    rows = []
    for name, (base, kind) in RUNS.items():
        command = [sys.executable, __file__, "--one", str(at / base), kind, str(at / f"{base}-{kind}")]
        command += ["--steps", str(steps), "--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"run": name, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one, options.steps, options.threads)
        return
    models = {}
    with tempfile.TemporaryDirectory() as temporary:
        at = Path(temporary)
        models["SmolLM2-135M"] = measure(options.model, at / "small", options.steps, options.threads)
        write_llama(at / "llama", options.model)
        models["random Llama, 1.2 B"] = measure(at / "llama", at / "large", options.steps, options.threads)
    save("memory", {"steps": options.steps, "tokens": 512, "models": models})


if __name__ == "__main__":
    main()
