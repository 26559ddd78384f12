"""bfloat16 products on this processor, as PyTorch makes them and in float32 (`sqft.core.bfloat16`), and a step.

    OMP_NUM_THREADS=1 python benchmarks/bfloat16.py runs/quickstart/dense

Products of a linear's shapes, forward; and forward and backward of the dense model on four rows of 256 tokens, with the
norms trained. The two ways alternate; ratios are medians over the rounds. On a processor with AMX or AVX-512 BF16 the
second way is never used, and this shows whether that is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from common import alternate, ratio, save
from sqft.core import bfloat16
from sqft.core.bfloat16 import _InFloat32

SHAPES = [(1024, 576, 1536), (1024, 576, 576), (1024, 576, 49152), (32, 576, 1536), (1024, 2048, 2048), (1, 576, 1536)]


def both(action: Callable[[], Any], rounds: int) -> dict[str, float]:
    def run(context: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            with context():
                action()

        return timed

    times = alternate({"bfloat16": run(nullcontext), "float32": run(_InFloat32)}, rounds)
    return {
        **{name: round(1e3 * sorted(each)[len(each) // 2], 3) for name, each in times.items()},
        "ratio": round(ratio(times, "bfloat16", "float32"), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"multiplies_bfloat16": bfloat16.multiplies_bfloat16(), "products_ms": {}}
    for rows, inputs, outputs in SHAPES:
        x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        label = f"{rows} x {inputs} x {outputs}"
        found["products_ms"][label] = both(lambda x=x, weight=weight: functional.linear(x, weight), options.rounds)
        print(label, found["products_ms"][label], flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="eager"
    ).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    ids = torch.randint(model.config.vocab_size, (4, 256))

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    found["step_ms"] = both(step, min(options.rounds, 3))
    print("step", found["step_ms"])
    save("bfloat16", found)


if __name__ == "__main__":
    main()
