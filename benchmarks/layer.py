"""One masked linear, forward and backward, against stock PEFT LoRA and the reference's two-matmul form.

    python benchmarks/layer.py [--threads 2] [--rounds 7] [--tokens 2048]

Matmuls of 2·T·O·I operations: LoRA 2, ours 3, reference 5; so the floor is 6/4 of LoRA and 6/10 of the reference.
The reference is written from the paper's equations 1 and 2: y = x Wᵀ + scaling · x ((B A) ⊙ M)ᵀ under autograd.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from common import alternate, peak_memory, ratio, save
from sqft.core.delta import MaskedLinear
from sqft.core.mask import pack_mask

SHAPES = {
    "SmolLM2 q": (576, 576),
    "SmolLM2 up": (1536, 576),
    "Llama-3-8B q": (4096, 4096),
    "Llama-3-8B up": (14336, 4096),
}
RANK, SCALING = 32, 2.0


def build(out: int, inputs: int, tokens: int, device: str) -> dict[str, object]:
    torch.manual_seed(0)
    mask = torch.rand(out, inputs, device=device) > 0.5
    weight = (torch.randn(out, inputs, device=device) * mask).bfloat16()
    x = torch.randn(tokens, inputs, device=device).bfloat16().requires_grad_()
    grad = torch.randn(tokens, out, device=device).bfloat16()
    base = nn.Linear(inputs, out, bias=False, dtype=torch.bfloat16, device=device)
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["x"])
    lora = LoraLinear(base, "default", config=config, r=RANK, lora_alpha=SCALING * RANK)
    lora_A, lora_B = lora.lora_A["default"].float().weight, lora.lora_B["default"].float().weight
    nn.init.normal_(lora_B)
    packed = pack_mask(mask)
    mask_bf16 = mask.bfloat16()

    def run(output: torch.Tensor) -> None:
        output.backward(grad)
        x.grad = lora_A.grad = lora_B.grad = None

    def stock() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            run(lora(x))

    def reference() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            run(base(x) + nn.functional.linear(x, (lora_B @ lora_A) * mask_bf16) * SCALING)

    def ours() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            run(MaskedLinear.apply(x, weight, None, lora_A, lora_B, SCALING, packed, False, device == "cuda"))

    return {"lora": stock, "reference": reference, "sqft": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, (out, inputs) in SHAPES.items():
        actions = build(out, inputs, options.tokens, device)
        times = alternate(actions, options.rounds)
        memory = {kind: peak_memory(action) for kind, action in actions.items()}
        row = {
            "shape": name,
            "out": out,
            "in": inputs,
            **{f"{kind}_ms": round(1e3 * statistics.median(t), 2) for kind, t in times.items()},
            "sqft_to_reference": round(ratio(times, "sqft", "reference"), 3),
            "sqft_to_lora": round(ratio(times, "sqft", "lora"), 3),
            **{f"{kind}_peak_mb": round(m / 1e6, 1) for kind, m in memory.items()},
        }
        rows.append(row)
        print(row, flush=True)
    save(
        f"layer_{device}",
        {
            "tokens": options.tokens,
            "rounds": options.rounds,
            "floor": {"to_reference": 0.6, "to_lora": 1.5},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
