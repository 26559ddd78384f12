"""What a GPU has to show: exactness, a layer's step, and a model compressed, in one call.

    python benchmarks/gpu.py [--out benchmarks/results] [--toy] [--blocks 4] [--only exact layer compress run]

exact     W', Ŵ' and codes of the kernels on the card against the ordered arithmetic on the CPU, to the bit
layer     one linear at Llama-3-8B's shapes, forward and backward, beside stock LoRA and the reference's form
compress  a random model of Llama-3-8B's blocks, pruned and quantised in one pass on 128 × 2,048 tokens
run       a tiny random model through all stages: what the card merges equals what it trained, and so says a CPU

Nothing is downloaded: torch, Triton, transformers, PEFT and what sqft imports are enough, with src/ on PYTHONPATH. A
section that fails is recorded with its error, and the others go on. `--toy` takes shapes that a CPU does in seconds:
the dry run of a test. Times are medians of rounds in which the forms take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, alternate, machine, peak_memory, ratio
from sqft.context import Context
from sqft.core.delta import MaskedLinear, adapter_gradients, effective_codes, effective_weight
from sqft.core.grid import BITS, Grid, QuantizedWeight, pack_codes
from sqft.core.mask import pack_mask
from sqft.device import resolve
from sqft.recipe import CalibrationConfig, QuantizeConfig, SparsifyConfig

RANK, SCALING = 32, 2.0
LAYERS = {"q": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336)}
TOY = {"toy": (96, 64)}


def quantised(weight_OI: torch.Tensor, bits: int, group: int, start: str | None = "compensated") -> QuantizedWeight:
    grid = Grid.fit(weight_OI, bits=bits, group_size=group, symmetric=False, dtype=torch.bfloat16)
    codes = grid.quantize(weight_OI)
    offsets = grid.offsets(weight_OI, codes) if start else None
    return QuantizedWeight(pack_codes(codes, bits), grid, torch.bfloat16, offsets)


def moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    grid = weight.grid
    there = Grid(grid.scale_OG.to(device), grid.zero_OG.to(device), grid.bits, grid.columns, grid.symmetric)
    start = None if weight.start is None else weight.start.to(device)
    return QuantizedWeight(weight.packed.to(device), there, weight.dtype, start)


def different(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return in how many elements two tensors differ in their bits."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    return int((one.cpu().contiguous().view(width) != other.cpu().contiguous().view(width)).count_nonzero())


def exact(device: torch.device, toy: bool) -> dict[str, Any]:
    """Compare the card's weights with the CPU's ordered arithmetic; every number must be 0."""
    shapes = [(96, 64), (80, 192)] if toy else [(576, 576), (576, 1536), (1536, 576), (4096, 4096), (1000, 4160)]
    rows = []
    for out, columns in shapes:
        torch.manual_seed(out + columns)
        mask_OI = torch.rand(out, columns) > 0.5
        mask = pack_mask(mask_OI)
        float_OI = torch.randn(out, columns) * 0.02
        factors = torch.randn(RANK, columns) * 0.1, torch.randn(out, RANK) * 0.01
        there = [tensor.to(device) for tensor in factors]
        row: dict[str, Any] = {"out": out, "in": columns}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight = (float_OI * mask_OI).to(dtype)
            ours = effective_weight(weight, *factors, SCALING, mask, ordered=True)
            card = effective_weight(weight.to(device), *there, SCALING, mask.to(device), ordered=True)
            row[f"W' {str(dtype).removeprefix('torch.')}"] = different(ours, card)
        for bits in BITS:
            weight = quantised(float_OI * mask_OI, bits, 32)
            at = moved(weight, device)
            for name, made in (("weight", effective_weight), ("codes", effective_codes)):
                ours = made(weight, *factors, SCALING, mask, ordered=True)
                row[f"{name} {bits} bits"] = different(ours, made(at, *there, SCALING, mask.to(device), ordered=True))
        rows.append(row)
    off = sum(value for row in rows for name, value in row.items() if name not in ("out", "in"))
    return {"elements_that_differ": off, "passed": off == 0, "shapes": rows}


def layer(device: torch.device, toy: bool) -> dict[str, Any]:
    """Time one linear's step: LoRA, the reference's form, ours on a float base, ours on a quantised one."""
    tokens, rounds = (64, 2) if toy else (2048, 7)
    rows = [
        {
            "shape": name,
            "out": shape[0],
            "in": shape[1],
            **step_times(device, *shape, tokens, rounds, 0.01 if toy else 0.1),
        }
        for name, shape in (TOY if toy else LAYERS).items()
    ]
    return {"tokens": tokens, "rank": RANK, "rounds": rounds, "rows": rows}


def step_times(device: torch.device, out: int, columns: int, tokens: int, rounds: int, least: float) -> dict[str, Any]:
    """Return milliseconds, peak memory and ratios of each form of a step on one linear."""
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear

    torch.manual_seed(0)
    mask_OI = torch.rand(out, columns) > 0.5
    float_OI = torch.randn(out, columns) * 0.02 * mask_OI
    weight, mask = float_OI.bfloat16().to(device), pack_mask(mask_OI).to(device)
    packed = moved(quantised(float_OI, 4, 32), device)
    x = torch.randn(tokens, columns, device=device).bfloat16().requires_grad_()
    grad = torch.randn(tokens, out, device=device).bfloat16()
    base = nn.Linear(columns, out, bias=False, dtype=torch.bfloat16, device=device)
    base.weight = nn.Parameter(weight, requires_grad=False)
    alpha = int(SCALING * RANK)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["x"])
    lora = LoraLinear(base, "default", config=config, r=RANK, lora_alpha=alpha)
    lora_A, lora_B = lora.lora_A["default"].float().weight, lora.lora_B["default"].float().weight
    nn.init.normal_(lora_B, std=0.01)
    wide = mask_OI.bfloat16().to(device)
    given = (None, lora_A, lora_B, SCALING, mask, False, device.type == "cuda")

    def reference() -> torch.Tensor:
        return base(x) + nn.functional.linear(x, (lora_B @ lora_A) * wide) * SCALING  # type: ignore[no-any-return]

    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "lora": lambda: lora(x),
        "reference": reference,
        "masked": lambda: MaskedLinear.apply(x, weight, *given),
        "quantised": lambda: MaskedLinear.apply(x, packed, *given),
    }

    def step(forward: Callable[[], torch.Tensor]) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = forward()
        output.backward(grad)
        x.grad = lora_A.grad = lora_B.grad = None

    actions: dict[str, Callable[[], Any]] = {name: partial(step, forward) for name, forward in forwards.items()}
    times = alternate(actions, rounds, least)
    memory = {kind: peak_memory(action) for kind, action in actions.items()}
    return {
        **{f"{kind}_ms": round(1e3 * statistics.median(t), 3) for kind, t in times.items()},
        **{f"{kind}_peak_mb": round(m / 1e6, 1) for kind, m in memory.items()},
        "masked_to_lora": round(ratio(times, "masked", "lora"), 3),
        "masked_to_reference": round(ratio(times, "masked", "reference"), 3),
        "quantised_to_masked": round(ratio(times, "quantised", "masked"), 3),
        "parts_ms": parts(device, weight, packed, lora_A.detach(), lora_B.detach(), mask, rounds, least / 2),
    }


def parts(
    device: torch.device,
    weight: torch.Tensor,
    packed: QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    mask: torch.Tensor,
    rounds: int,
    least: float,
) -> dict[str, float]:
    """Return the milliseconds of what a step does beside its three products."""
    ordered, given = device.type == "cuda", (lora_A, lora_B, SCALING, mask)
    gradient = torch.randn(weight.shape, device=device).bfloat16()
    actions: dict[str, Callable[[], Any]] = {
        "W'": lambda: effective_weight(weight, *given, ordered=ordered),
        "quantised W'": lambda: effective_weight(packed, *given, ordered=ordered),
        "gradients of A and B": lambda: adapter_gradients(gradient, *given),
        "copy": lambda: weight.clone(),
    }
    times = alternate(actions, rounds, least)
    return {name: round(1e3 * statistics.median(t), 3) for name, t in times.items()}


def write_model(folder: Path, blocks: int, toy: bool) -> int:
    """Write a random bf16 Llama of Llama-3-8B's blocks; return its weights in the blocks' linears."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if toy:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=1024, num_hidden_layers=blocks, max_position_embeddings=2048, tie_word_embeddings=True, **sizes
    )
    torch.manual_seed(0)
    with torch.device(resolve()):
        model: Any = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n)


def compress(device: torch.device, toy: bool, blocks: int) -> dict[str, Any]:
    """Prune and quantise in one pass, and say what one block takes."""
    from sqft.stages import quantize

    samples, length, batch = (4, 32, 2) if toy else (128, 2048, 8)
    with tempfile.TemporaryDirectory() as place:
        weights = write_model(Path(place) / "model", blocks, toy)
        tokens = torch.randint(0, 1000, (samples, length), generator=torch.Generator().manual_seed(0))
        calibration = CalibrationConfig(samples=samples, length=length, batch=batch)
        prune = SparsifyConfig(calibration=calibration)
        grid = QuantizeConfig(group_size=32 if toy else 128, calibration=calibration)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        context = Context(device_name="cuda" if device.type == "cuda" else "cpu")
        made = quantize.run(grid, Path(place) / "model", tokens, Path(place) / "out", context, sparsify=prune)
        seconds = time.perf_counter() - started
        result = made.manifest["result"]
    return {
        "blocks": blocks,
        "weights": weights,
        "tokens": samples * length,
        "seconds": round(seconds, 2),
        "seconds_a_block": round(seconds / blocks, 2),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "sparsity": result["sparsity"],
    }


def run(device: torch.device, toy: bool) -> dict[str, Any]:
    """Take a tiny model through all stages on the card, then merge and verify its adapter on the CPU as well."""
    from sqft import pipeline, verbs
    from sqft.doctor import _recipe

    with tempfile.TemporaryDirectory() as place:
        made = pipeline.run(_recipe(Path(place)), Path(place) / "run")
        found = json.loads((made.out / "verify.json").read_text())
        base, adapter = made.out / "quantized", made.out / "sub_adapter"
        verbs.merge(base, adapter, Path(place) / "merged", device="cpu")
        same = [
            (Path(place) / "merged" / path.name).read_bytes() == path.read_bytes()
            for path in (made.out / "merged").glob("*.safetensors")
        ]
        settings = json.loads((adapter / "adapter_config.json").read_text())
    return {
        "verified": made.verified,
        "checks": {check["name"]: check["value"] for check in found["checks"]},
        "merged_on_the_cpu_is_the_same": bool(same) and all(same),
        "arithmetic": settings.get("arithmetic"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=["exact", "layer", "compress", "run"])
    options = parser.parse_args()
    device = resolve("cpu" if options.toy else "auto")
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "exact": lambda: exact(device, options.toy),
        "run": lambda: run(device, options.toy),
        "layer": lambda: layer(device, options.toy),
        "compress": lambda: compress(device, options.toy, 2 if options.toy else options.blocks),
    }
    result: dict[str, Any] = {"machine": machine()}
    path = options.out / ("gpu.json" if device.type == "cuda" else "gpu_dry_run.json")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or sections:
        started = time.perf_counter()
        try:
            result[name] = sections[name]()
        except Exception as error:  # the other sections are worth having
            result[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        result[name]["section_seconds"] = round(time.perf_counter() - started, 1)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(name, json.dumps(result[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
