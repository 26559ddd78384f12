"""A training step with eager, sdpa and example-by-example attention, as rows grow: what `auto` goes by on a CPU.

    python benchmarks/attention.py MODEL_FOLDER [--threads 2] [--rounds 3]

Every step has 2,048 tokens in random examples of 64 tokens, packed into rows of each length; masked adapters of rank 32
on q, k, v, up and down, bf16 under autocast, as `sqft finetune` trains.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import ADAPTERS, alternate, peak_memory, save
from sqft.adapters.attach import load_model
from sqft.recipe import FinetuneConfig
from sqft.stages.finetune import attach
from sqft.training.attention import attend_by_example
from sqft.training.batches import IGNORED, collate, pack_rows
from sqft.training.loss import answer_loss

LENGTHS, TOKENS, EXAMPLE, ANSWER = (256, 512, 1024, 2048), 2048, 64, 10
KINDS = ("eager", "sdpa", "by example")


def batch(length: int) -> dict[str, torch.Tensor]:
    examples = torch.randint(5, 5000, (TOKENS // EXAMPLE, EXAMPLE), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": ids, "labels": [IGNORED] * (EXAMPLE - ANSWER) + ids[-ANSWER:]} for ids in examples]
    return collate(pack_rows(rows, length, packing=True), 0)


def step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = answer_loss(model, inputs)
    loss.backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = FinetuneConfig(kind="sparse", **ADAPTERS)
    models = {}
    for kind in KINDS:
        model = load_model(options.model, attention="eager" if kind == "eager" else "sdpa")
        if kind == "by example":
            attend_by_example(model)
        models[kind] = attach(model, config).train()
    rows = []
    for length in LENGTHS:
        actions = {kind: partial(step, model, batch(length)) for kind, model in models.items()}
        times = alternate(actions, options.rounds)
        seconds = {kind: statistics.median(found) for kind, found in times.items()}
        memory = {kind: peak_memory(action) for kind, action in actions.items()}
        rows.append({"length": length, "seconds": seconds, "step_bytes": memory})
        print(rows[-1], flush=True)
    save("attention", {"rounds": options.rounds, "tokens": TOKENS, "example": EXAMPLE, "rows": rows})


if __name__ == "__main__":
    main()
