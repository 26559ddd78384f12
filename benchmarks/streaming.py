"""Compress a random Llama of more than 1 B parameters that never fits the memory it is given.

    python benchmarks/streaming.py [--joint] [--samples 128] [--folder /tmp/llama-1b] [--threads 2]

Wanda, or with --joint Wanda and GPTQ in one pass. Reports anonymous resident memory (RssAnon, sampled) above what the
imports take, as a share of the weights' size; of the joint pass also the bound that sqft.stages.quantize states.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from pathlib import Path

import torch

from common import save


def anonymous() -> int:
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon:"))


def write_model(folder: Path) -> None:
    """Write a random bf16 Llama shard by shard, one layer in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    h, i, kv, index = config.hidden_size, config.intermediate_size, 512, {}

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape).mul_(0.02).bfloat16()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    shard("model-embed.safetensors", {"model.embed_tokens.weight": (32000, h), "model.norm.weight": (h,)})
    shard("model-head.safetensors", {"lm_head.weight": (32000, h)})
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}"
        shard(f"model-{layer:02}.safetensors", {
            f"{p}.self_attn.q_proj.weight": (h, h), f"{p}.self_attn.k_proj.weight": (kv, h),
            f"{p}.self_attn.v_proj.weight": (kv, h), f"{p}.self_attn.o_proj.weight": (h, h),
            f"{p}.mlp.gate_proj.weight": (i, h), f"{p}.mlp.up_proj.weight": (i, h),
            f"{p}.mlp.down_proj.weight": (h, i), f"{p}.input_layernorm.weight": (h,),
            f"{p}.post_attention_layernorm.weight": (h,),
        })  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sqft-llama-1b"))
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.folder.exists():
        write_model(options.folder)
    from sqft.context import Context
    from sqft.recipe import QuantizeConfig, SparsifyConfig
    from sqft.stages import quantize, sparsify
    from sqft.storage.checkpoint import Checkpoint

    out = options.folder.parent / f"{options.folder.name}-sparse"
    shutil.rmtree(out, ignore_errors=True)
    tokens = torch.randint(0, 32000, (options.samples, 256), generator=torch.Generator().manual_seed(0))
    # One small product first: the thread pools and oneDNN's own buffers belong to the imports.
    torch.randn(64, 64) @ torch.randn(64, 64)
    before, highest, running = anonymous(), 0, True

    def watch() -> None:
        nonlocal highest
        while running:
            highest = max(highest, anonymous())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if options.joint:
        config = QuantizeConfig(group_size=64)
        artifact = quantize.run(config, options.folder, tokens, out, Context(), sparsify=SparsifyConfig())
    else:
        artifact = sparsify.run(SparsifyConfig(), options.folder, tokens, out, Context())
    seconds = time.perf_counter() - start
    running = False
    watcher.join()
    weights = Checkpoint(options.folder).size_bytes
    result = {
        "parameters": sum(torch.Size(e.shape).numel() for e in Checkpoint(options.folder).entries.values()),
        "weights_bytes": weights,
        "peak_anonymous_bytes_above_imports": highest - before,
        "share_of_weights": round((highest - before) / weights, 4),
        "sparsity": artifact.manifest["result"]["sparsity"],
        "calibration_tokens": tokens.numel(),
        "seconds": round(seconds, 1),
    }
    if options.joint:
        # A block in bf16 and its masks; hidden states of all sequences three times; the widest hessian; ten stretches.
        block = sum(e.stop - e.start for n, e in Checkpoint(options.folder).entries.items() if ".layers.0." in n)
        result["bound_bytes"] = block * 3 // 2 + 3 * tokens.numel() * 2048 * 2 + 12 * 8192**2 + 10 * 2**25
    print(json.dumps(result, indent=2))
    save("streaming_joint" if options.joint else "streaming", result)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
