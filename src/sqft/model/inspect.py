"""What a model folder holds: zeros per layer, N:M conformity, precision and size, read tensor by tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sqft.core.mask import conforms
from sqft.errors import InputError
from sqft.model.checkpoint import Checkpoint
from sqft.model.targets import DiskNames, find_targets, skeleton

STRUCTURES = ((2, 4), (4, 8))


def inspect_model(folder: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the facts of a model folder.

    Returns:
        {sparsity: fraction of zeros of the linears in the decoder blocks, total_sparsity: of all tensors, layers:
        [{name, shape, sparsity, weights, patterns}], precision: {dtype: share of values}, size_bytes}. `patterns` lists
        the N:M patterns that every group of the layer's rows keeps to.

    Raises:
        InputError: the folder is no model folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model {folder}: no such folder")
    checkpoint = Checkpoint(folder)
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    targets, _ = find_targets(model)
    targeted = {f"{t.module}.{t.parameter}": t.transposed for t in targets}
    names = DiskNames(model, checkpoint)
    layers: list[dict[str, Any]] = []
    precision: Counter[str] = Counter()
    zeros = total = 0
    for name, entry in checkpoint.entries.items():
        tensor = checkpoint.read(name)
        here = int((tensor == 0).sum())
        zeros, total = zeros + here, total + tensor.numel()
        precision[str(entry.dtype).removeprefix("torch.")] += tensor.numel()
        parameter = names.parameter_of[name]
        if parameter in targeted:
            rows = tensor.T if targeted[parameter] and tensor.ndim == 2 else tensor
            patterns = [f"{n}:{m}" for n, m in STRUCTURES if conforms(rows != 0, n, m)]
            layers.append(
                {
                    "name": name.removesuffix(".weight"),
                    "shape": list(tensor.shape),
                    "sparsity": round(here / tensor.numel(), 6),
                    "weights": tensor.numel(),
                    "patterns": patterns,
                }
            )
    weights = sum(layer["weights"] for layer in layers)
    targeted_zeros = sum(layer["sparsity"] * layer["weights"] for layer in layers)
    return {
        "sparsity": round(targeted_zeros / weights, 6) if weights else 0.0,
        "total_sparsity": round(zeros / total, 6) if total else 0.0,
        "layers": layers,
        "precision": {dtype: round(count / total, 6) for dtype, count in precision.most_common()},
        "size_bytes": sum((folder / file).stat().st_size for file in {e.file for e in checkpoint.entries.values()}),
    }
