"""A whole training step on SmolLM2, and tokens per second against a plain loop with stock PEFT LoRA and padding.

    python benchmarks/training.py MODEL_FOLDER [--quantized FOLDER] [--data mawps] [--threads 2] [--rounds 3]

Same examples for all: MAWPS (or seeded reasoning-gym problems with --data gym:chain_sum). `plain` is what a user
writes first: stock LoRA, rows padded to the longest of a batch of 16, loss over all answer tokens, sdpa, bf16 autocast.
`packed_lora` and `packed_reference` share our packed rows and head, so they isolate the adapters' own cost. With
--quantized (the same model, quantised) two rows more: `int4_lora` (kind dense on the packed base, the paper's SQFT) and
`int4_qa` (kind quantized). Memory is what the model holds plus the highest that a step adds. The share of matrix
products in a step, attention apart, is the profiler's. On a processor without bfloat16 instructions all but `plain`
compute in float32, as finetune does.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from common import ADAPTERS, alternate, peak_memory, ratio, save
from sqft.adapters.attach import load_model
from sqft.adapters.float32 import compute_in_float32
from sqft.adapters.layers import SqftLinear
from sqft.core.bfloat16 import multiplies_bfloat16
from sqft.data.encode import encode
from sqft.data.load import load_examples
from sqft.model.opening import load_tokenizer
from sqft.model.packed import PackedLinear
from sqft.recipe import DataConfig, FinetuneConfig
from sqft.stages.finetune import attach
from sqft.training.attention import attend_by_example
from sqft.training.batches import IGNORED, collate, label_examples, pack_rows
from sqft.training.loss import answer_loss

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    ids = fill("input_ids", pad)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": ids,
        "labels": fill("labels", IGNORED),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
    }


def two_matmuls(layer: SqftLinear, x: torch.Tensor) -> torch.Tensor:
    """The reference's forward: y = x Wᵀ + scaling · x ((B A) ⊙ M)ᵀ."""
    lora_A, lora_B = layer.factors("default")
    delta = (lora_B @ lora_A) * layer.dense_mask
    return layer.base_layer(x) + functional.linear(x, delta.to(x.dtype)) * layer.scaling["default"]


def resident(model: torch.nn.Module) -> int:
    """Return the bytes of everything that a model holds, each tensor once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def packed_share(model: torch.nn.Module) -> float:
    """Return the bytes of the packed linears over what they would be in bfloat16."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    packed = sum(p.nbytes for layer in layers for name, p in layer.named_parameters() if name != "bias")
    return round(packed / sum(2 * layer.in_features * layer.out_features for layer in layers), 4)


def products_share(action: Callable[[], Any]) -> float:
    """Return the share of matrix products in an action's time, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        action()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return round(sum(times.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm")) / sum(times.values()), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantized", type=Path)
    parser.add_argument("--data", default="mawps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    examples = load_examples(DataConfig(task=options.data), "train", 0, tokenizer)
    pairs = [encode(tokenizer, e.prompt, e.answer) for e in examples[:600]]
    rows = label_examples(pairs, tokenizer.eos_token_id, length=256, model_length=None, completion_only=True)
    packed = pack_rows(rows, 256, packing=True)[:8]
    used = sum(len(row["input_ids"]) for row in packed)
    batch = collate(packed, tokenizer.pad_token_id)
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]
    plain_rows = shuffled[:16]
    plain_used = sum(len(row["input_ids"]) for row in plain_rows)
    plain_batch = padded(plain_rows, tokenizer.pad_token_id)

    def ours(kind: str, folder: Path = options.model) -> Any:
        network = load_model(folder, packed=True, attention="eager" if multiplies_bfloat16() else None)
        attend_by_example(network)  # as finetune does; an eager model stays as it is
        model = attach(network, FinetuneConfig(kind=kind, **ADAPTERS)).train()  # type: ignore[arg-type]
        compute_in_float32(model)
        return model

    stock = get_peft_model(
        load_model(options.model), LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
    ).train()
    sparse, dense, reference = ours("sparse"), ours("dense"), ours("sparse")
    for module in reference.modules():
        if isinstance(module, SqftLinear):
            module.dense_mask = (module.weight_OI != 0).bfloat16()
            if not multiplies_bfloat16():  # its base multiplies too
                module.base_layer.float()
            module.forward = two_matmuls.__get__(module)  # type: ignore[method-assign]

    def plain() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock(**plain_batch).loss.backward()
        stock.zero_grad()

    def step(model: Any) -> None:
        answer_loss(model, batch).backward()
        model.zero_grad()

    actions = {
        "plain_trainer_lora": plain,
        "packed_lora": lambda: step(dense),
        "packed_reference": lambda: step(reference),
        "packed_sqft": lambda: step(sparse),
    }
    models = {"plain_trainer_lora": stock, "packed_lora": dense, "packed_reference": reference, "packed_sqft": sparse}
    if options.quantized:
        models |= {"int4_lora": ours("dense", options.quantized), "int4_qa": ours("quantized", options.quantized)}
        actions |= {name: lambda name=name: step(models[name]) for name in ("int4_lora", "int4_qa")}
    times = alternate(actions, options.rounds)
    held = {name: resident(model) for name, model in models.items()}
    memory = {name: peak_memory(action) for name, action in actions.items()}
    tokens = {name: plain_used if name == "plain_trainer_lora" else used for name in actions}

    def memory_ratio(name: str) -> float:
        return round((held[name] + memory[name]) / (held["packed_lora"] + memory["packed_lora"]), 3)

    mean_length = sum(len(row["input_ids"]) for row in rows) / len(rows)
    speed = {name: statistics.median(tokens[name] / t for t in times[name]) for name in actions}
    result = {
        "data": options.data,
        "rounds": options.rounds,
        "tokens_per_step": tokens,
        "mean_tokens_per_example": round(mean_length, 1),
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "examples_per_second": {name: round(value / mean_length, 2) for name, value in speed.items()},
        "sqft_to_plain_tokens_per_second": round(
            statistics.median(
                (used / a) / (plain_used / b)
                for a, b in zip(times["packed_sqft"], times["plain_trainer_lora"], strict=True)
            ),
            3,
        ),
        "masked_to_unmasked_speed": round(ratio(times, "packed_lora", "packed_sqft"), 3),
        "step_time_to_lora": round(ratio(times, "packed_sqft", "packed_lora"), 3),
        "step_time_to_reference": round(ratio(times, "packed_sqft", "packed_reference"), 3),
        "bfloat16_instructions": multiplies_bfloat16(),
        "products_share": {name: products_share(action) for name, action in actions.items()},
        "step_bytes": memory,
        "held_bytes": held,
        "peak_memory_to_lora": memory_ratio("packed_sqft"),
    }
    if options.quantized:
        result |= {
            "qa_step_time_to_sparse": round(ratio(times, "int4_qa", "packed_sqft"), 3),
            "int4_lora_step_time_to_lora": round(ratio(times, "int4_lora", "packed_lora"), 3),
            "qa_memory_to_lora": memory_ratio("int4_qa"),
            "int4_lora_memory_to_lora": memory_ratio("int4_lora"),
            "quantised_linears_to_bfloat16": packed_share(models["int4_lora"]),
        }
    for name, value in result.items():
        print(name, value, flush=True)
    save("training", result)


if __name__ == "__main__":
    main()
