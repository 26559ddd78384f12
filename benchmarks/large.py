"""What each stage takes of memory and disk at the shapes of a large model: what grows with its blocks, and what not.

    python benchmarks/large.py MODEL_FOLDER [--shape Llama-3-8B] [--blocks 2 4] [--method gptq]

A random model with these shapes in bfloat16 (of Llama-3-8B: 4,096 hidden, 14,336 in between, 128,256 tokens, untied)
and a few blocks goes through the stages, each in a process of its own: Wanda to 50 % on 8 x 128 tokens, GPTQ (or
rounding) to 4 bits, two steps of quantisation-aware training at rank 8, merge, and verify without generated answers.
`peak` is the highest resident memory of the process, libraries and all; `written` is what the folder of a stage takes.
MODEL_FOLDER lends its tokenizer. It takes 20 GB of disk.
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

from common import save

# Hidden size, the size in between, tokens, heads of keys and values.
SHAPES = {"Llama-3-8B": (4096, 14336, 128256, 8), "TinyLlama-1.1B": (2048, 5632, 49152, 4)}
STAGES = ("sparsify", "quantize", "finetune", "merge", "verify")
SAMPLES, LENGTH = 8, 128


def write_model(folder: Path, like: Path, shape: str, blocks: int) -> int:
    """Write the random model, whose numbers repeat every 4 million; return its bytes."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, between, vocabulary, pairs = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=between, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=pairs, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with init_empty_weights():
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        repeated = numbers.repeat(-(-shape.numel() // len(numbers)))[: shape.numel()].view(shape)
        tensors[name] = repeated.clone() if "norm" not in name else torch.ones(shape, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for file in like.glob("*token*"):
        shutil.copy(file, folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def one(stage: str, at: Path, threads: int, method: str) -> None:
    """Run one stage and print what it took; the body of a process."""
    import torch

    from sqft.context import Context
    from sqft.memory import begin_peak, peak_memory_bytes
    from sqft.recipe import FinetuneConfig, MergeConfig, QuantizeConfig, SparsifyConfig, VerifyConfig
    from sqft.stages import finetune, merge, quantize, sparsify, verify

    torch.set_num_threads(threads)
    begin_peak()
    found: dict[str, Any] = {"libraries": peak_memory_bytes()}
    tokens = torch.randint(0, 40000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    calibration = {"samples": SAMPLES, "length": LENGTH, "batch": SAMPLES}
    context = Context(device_name="cpu")
    if stage == "sparsify":
        artifact = sparsify.run(
            SparsifyConfig.model_validate({"calibration": calibration}), at / "model", tokens, at / "sparse", context
        )
    elif stage == "quantize":
        artifact = quantize.run(
            QuantizeConfig.model_validate({"method": method, "calibration": calibration}),
            at / "sparse",
            None if method == "rtn" else tokens,
            at / "int4",
            context,
        )
    elif stage == "finetune":
        config = FinetuneConfig.model_validate(
            {"kind": "quantized", "ranks": [8], "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"],
             "max_steps": 2, "length": 64, "batch": 1, "accumulation": 1, "learning_rate": 1e-3}
        )  # fmt: skip
        pairs = [(f"{a} plus {b} makes", f" {a + b}") for a in range(20) for b in range(20)]
        artifact = finetune.run(config, at / "int4", pairs, [], at / "adapter", context, data={})
    elif stage == "merge":
        artifact = merge.run(MergeConfig(), at / "int4", at / "adapter", at / "merged", context)
    else:
        sides = at / "merged", at / "int4", at / "adapter"
        proof = verify.run(VerifyConfig(), *sides, at / "verify.json", context)
        assert proof["passed"], proof["checks"]
        cost = proof["cost"]
        print(json.dumps({**found, "peak": peak_memory_bytes(), "written": 0, "seconds": cost["seconds"]}))
        return
    manifest = artifact.manifest
    found |= {"peak": manifest["peak_memory_bytes"], "written": manifest["size_bytes"], "seconds": manifest["seconds"]}
    print(json.dumps(found))


def measure(like: Path, at: Path, shape: str, blocks: int, threads: int, method: str) -> dict[str, Any]:
    """Return the figures of all stages of a model with so many blocks."""
    rows: dict[str, Any] = {"model_bytes": write_model(at / "model", like, shape, blocks)}
    for stage in STAGES:
        command = [sys.executable, __file__, "--stage", stage, str(at), "--threads", str(threads), "--method", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{stage} failed: {done.stdout}")
        rows[stage] = json.loads(done.stdout.splitlines()[-1])
        print(blocks, stage, rows[stage], flush=True)
        if stage == "sparsify":
            shutil.rmtree(at / "model")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--shape", choices=list(SHAPES), default="Llama-3-8B")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        one(options.stage[0], Path(options.stage[1]), options.threads, options.method)
        return
    found = {}
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as temporary:
            found[str(blocks)] = measure(
                options.model, Path(temporary), options.shape, blocks, options.threads, options.method
            )
    save(
        "large",
        {"shape": options.shape, "samples": SAMPLES, "length": LENGTH, "method": options.method, "blocks": found},
    )


if __name__ == "__main__":
    main()
