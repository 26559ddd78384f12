"""One column loop: what SparseGPT and an update cost beside GPTQ, at the shapes of SmolLM2's and Llama-3-8B's linears.

    python benchmarks/columns.py [--rounds 5] [--threads 1] [--large]

Each round times GPTQ under a mask that is given (4 bits, groups of 64), then the same weight pruned and quantised in
one loop that chooses its mask (50 % per row, and 2:4), one that is given the mask and makes up for it, and pruning
alone.
All of them factor the hessian of the same random, correlated inputs. What is lost is ‖(Ŵ − W) X‖² / ‖W X‖², W dense.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from common import alternate, ratio, save
from sqft.core.columns import Pattern, prune_columns
from sqft.core.gptq import Quantized, gptq
from sqft.core.mask import mask_from_score

SHAPES = {
    "SmolLM2 q, k, v (960 × 576)": (960, 576),
    "SmolLM2 gate, up (3072 × 576)": (3072, 576),
    "SmolLM2 down (576 × 1536)": (576, 1536),
}
LARGE = {"Llama-3-8B q (4096 × 4096)": (4096, 4096)}
UNSTRUCTURED, TWO_OF_FOUR = Pattern(0.5), Pattern(0.5, (2, 4))


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, the hessian of correlated inputs, and Wanda's mask."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2 * columns, columns // 16, generator=generator)
    x = common @ torch.randn(columns // 16, columns, generator=generator) / 4
    x += torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    weight, hessian = torch.randn(rows, columns, generator=generator), x.T @ x
    return weight, hessian, mask_from_score(weight.abs() * hessian.diagonal().sqrt(), 0.5)


def actions(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> dict[str, Callable[[], Any]]:
    quantise = partial(gptq, bits=4, group_size=64, symmetric=False, dtype=torch.bfloat16)
    return {
        "gptq": lambda: quantise(weight, hessian, mask),
        "gptq, update": lambda: quantise(weight, hessian, mask, update=True),
        "gptq, sparsegpt": lambda: quantise(weight, hessian, None, pattern=UNSTRUCTURED),
        "gptq, sparsegpt 2:4": lambda: quantise(weight, hessian, None, pattern=TWO_OF_FOUR),
        "update": lambda: prune_columns(weight, hessian, mask),
        "sparsegpt": lambda: prune_columns(weight, hessian, None, pattern=UNSTRUCTURED),
        "sparsegpt 2:4": lambda: prune_columns(weight, hessian, None, pattern=TWO_OF_FOUR),
    }


def lost(made: Any, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    found = made.grid.dequantize(made.codes_OI) if isinstance(made, Quantized) else made[0]
    difference = found - weight
    return float((difference @ hessian * difference).sum() / (weight @ hessian * weight).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, Any] = {}
    for name, shape in (SHAPES | LARGE if options.large else SHAPES).items():
        weight, hessian, mask = problem(*shape)
        work = actions(weight, hessian, mask)
        times = alternate(work, options.rounds)
        rows[name] = {
            one: {
                "ms": round(1e3 * statistics.median(times[one]), 1),
                "to_gptq": round(ratio(times, one, "gptq"), 3),
                "lost": round(lost(action(), weight, hessian), 5),
            }
            for one, action in work.items()
        }
        print(name, rows[name], flush=True)
    save("columns", {"rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
