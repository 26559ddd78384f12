"""How fast a CPU decodes with weights as they are stored: one matrix out of the cache, and a model, token by token.

    python benchmarks/decode.py [FOLDER ...] [--threads 2] [--out]

Of each form there are as many matrices of 14336 x 4096 as exceed the cache, multiplied in turn with a few rows of x.
Forms alternate on one thread, times are the processor's, and ratios are medians of rounds: the machine has other users.
With --threads one row of x is also multiplied by so many, in seconds of the clock: for an idle machine. `read` sums the
bytes of the dense matrices, which is what the memory gives. A FOLDER (INT4 or sparse 16-bit) is packed into a temporary
archive, and both are opened by sqft.load_model. Results are kept by the processor's vectors: decode_avx2.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import sqft
from common import ratio, save
from sqft.core.grid import Grid, QuantizedWeight, pack_codes
from sqft.core.sparse import to_bitmask
from sqft.kernels import build, decode
from sqft.stages.pack import pack

ROWS, COLUMNS, GROUP = 14336, 4096, 64
ZEROS = 0.5


def padded(values: torch.Tensor) -> torch.Tensor:
    return functional.pad(values.contiguous().view(torch.uint8), (0, decode.SLACK)).view(values.dtype)


def forms() -> dict[str, decode.Stored]:
    """Return one random weight in each form; a sparse one has its zeros at random."""
    torch.manual_seed(0)
    shape = ROWS, COLUMNS
    weight = torch.randn(shape) * 0.02
    weight[torch.rand(shape) < ZEROS] = 0
    half = weight.bfloat16()
    bits = half.view(torch.int16)
    grid = Grid.fit(weight, bits=4, group_size=GROUP, symmetric=False, dtype=torch.bfloat16)
    codes = grid.quantize(weight)
    packed = QuantizedWeight(pack_codes(codes, 4), grid, torch.bfloat16)
    parts: dict[str, Any] = {"scale": grid.scale_OG.view(torch.uint8), "zero": grid.zero_OG}
    sparse = to_bitmask(bits, bits != 0)
    # Half of the codes are zero; rounding adds to that, so the mask of the weight is taken, as an archive does.
    coded = to_bitmask(codes, weight != 0, group=GROUP)
    return {
        "bf16": decode.Stored(shape, half),
        "sparse_bf16": decode.Stored(shape, padded(sparse.values_K), sparse.mask_OW, sparse.offsets_O),
        "int4": decode.Stored(shape, packed.packed, **parts),
        "sparse_int4": decode.Stored(shape, padded(coded.values_K), coded.mask_OW, coded.offsets_O, **parts),
    }


def size(weight: decode.Stored) -> int:
    parts = (weight.values, weight.mask, weight.ends, weight.scale, weight.zero)
    return sum(part.nbytes for part in parts if part is not None)


def copies(weight: decode.Stored, count: int) -> list[decode.Stored]:
    names = ("values", "mask", "ends", "scale", "zero")
    return [
        decode.Stored(weight.shape, **{n: None if (v := getattr(weight, n)) is None else v.clone() for n in names})
        for _ in range(count)
    ]


def matrices(rounds: int, count: int, rows: int, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """Return milliseconds, GB/s and ratios to PyTorch's dense product, of one matrix and `rows` rows of x."""
    weights = {name: copies(weight, count) for name, weight in forms().items()}
    dense = [weight.values for weight in weights["bf16"]]
    x = torch.randn(rows, COLUMNS).bfloat16()
    actions: dict[str, Callable[[], Any]] = {
        "read": lambda: [matrix.view(torch.int64).sum() for matrix in dense],
        "torch_bf16": lambda: [functional.linear(x, matrix) for matrix in dense],
        **{name: lambda many=many: [w.product(x) for w in many] for name, many in weights.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = clock()
            action()
            if turn:
                times[name].append(clock() - start)
    found = {}
    for name, seconds in times.items():
        stored = size(weights.get(name, weights["bf16"])[0])
        median = statistics.median(seconds) / count
        found[name] = {
            "milliseconds": median * 1e3,
            "bytes": stored,
            "gigabytes_a_second": stored / median / 1e9,
            "times_torch_bf16": ratio(times, "torch_bf16", name),
        }
        print(f"{rows} rows, {name}: {median * 1e3:.2f} ms, {stored / median / 1e9:.1f} GB/s, "
              f"{found[name]['times_torch_bf16']:.2f} times torch")  # fmt: skip
    return found


def tokens_a_second(folder: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Return tokens a second and bytes in memory of a folder, its archive and, of INT4, the folder kept packed."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        archive = pack(folder, Path(name) / "archive").path
        models: dict[str, Any] = {"plain": sqft.load_model(folder), "archive": sqft.load_model(archive)}
        if getattr(models["plain"], "is_quantized", False):
            models["packed"] = sqft.load_model(folder, packed=True)
        ids = torch.randint(1000, 2000, (1, 16), generator=torch.Generator().manual_seed(0))
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name, model in models.items():
                begun: list[float] = []
                cache = model(ids, use_cache=True).past_key_values  # the prompt is read outside the time
                token = ids[:, -1:]
                for _ in range(tokens):
                    start = time.process_time()
                    token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                    begun.append(time.process_time() - start)
                if turn:  # the first decompresses
                    speeds[name].append(1 / statistics.median(begun))
        result = {
            name: {
                "tokens_a_second": statistics.median(values),
                "times_plain": statistics.median(a / b for a, b in zip(values, speeds["plain"], strict=True)),
                "bytes": sum(t.nbytes for t in (*models[name].parameters(), *models[name].buffers())),
            }
            for name, values in speeds.items()
        }
    for name, found in result.items():
        print(f"{folder.name}, {name}: {found['tokens_a_second']:.1f} tokens/s, {found['bytes'] / 1e6:.0f} MB")
    return result


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--matrices", type=int, default=4, help="that are multiplied in turn")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, help="measure one row of x on so many threads too, on an idle machine")
    parser.add_argument("--out", action="store_true", help="write benchmarks/results/decode_VECTORS.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert decode.KERNEL.absence() is None, decode.KERNEL.absence()
    result: dict[str, Any] = {
        "shape": [ROWS, COLUMNS],
        "group": GROUP,
        "zeros": ZEROS,
        "rows": {str(rows): matrices(options.rounds, options.matrices, rows) for rows in (1, 4, 8)},
        "models": {folder.name: tokens_a_second(folder, options.rounds, options.tokens) for folder in options.folders},
    }
    if options.threads:
        torch.set_num_threads(options.threads)
        result["by_threads"] = {str(options.threads): matrices(options.rounds, options.matrices, 1, time.perf_counter)}
        torch.set_num_threads(1)
    if options.out:
        save(f"decode_{build.processor().lower()}", result)


if __name__ == "__main__":
    main()
