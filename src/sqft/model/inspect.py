"""What a model folder holds: zeros per layer, N:M conformity, precision and size, read tensor by tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sqft.core.mask import conforms
from sqft.errors import InputError
from sqft.model.names import DiskNames
from sqft.model.targets import every_matrix, skeleton
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint, quantization_config

STRUCTURES = ((2, 4), (4, 8))


def inspect_model(folder: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the facts of a model folder.

    Returns:
        {sparsity: fraction of zeros of the linears in the decoder blocks, total_sparsity: of all tensors, layers:
        [{name, shape, sparsity, weights, patterns}], precision: {dtype: share of values}, size_bytes}. `patterns` lists
        the N:M patterns that every group of the layer's rows keeps to. A quantised model's zeros are the codes that
        equal the zero point; its precision is int4 and the like, and `quantization` has its scheme.

    Raises:
        InputError: the folder is no model folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model {folder}: no such folder")
    checkpoint = Checkpoint(folder)
    packed = None if quantization_config(folder) is None else PackedCheckpoint(folder)
    model = skeleton(folder, trust_remote_code=trust_remote_code)
    every, unfit = every_matrix(model)
    targets = [target for target in every if target not in unfit]
    targeted = {f"{t.module}.{t.parameter}": t.transposed for t in targets}
    stored = {} if packed is None else packed.stored_names()
    names = DiskNames(model, checkpoint, skip=stored)
    layers: list[dict[str, Any]] = []
    precision: Counter[str] = Counter()
    zeros = total = 0
    for name in [*names.parameter_of, *([] if packed is None else packed.shapes)]:
        if packed is not None and name in packed.shapes:
            codes, grid = packed.read(name)
            nonzero, dtype = codes != grid.zero_codes(), f"int{grid.bits}"
        else:
            tensor = checkpoint.read(name)
            nonzero, dtype = tensor != 0, str(tensor.dtype).removeprefix("torch.")
        here = nonzero.numel() - int(nonzero.count_nonzero())
        zeros, total = zeros + here, total + nonzero.numel()
        precision[dtype] += nonzero.numel()
        parameter = names.parameter(name)
        if parameter in targeted:
            rows = nonzero.T if targeted[parameter] and nonzero.ndim == 2 else nonzero
            patterns = [f"{n}:{m}" for n, m in STRUCTURES if conforms(rows, n, m)]
            layers.append(
                {
                    "name": name.removesuffix(".weight"),
                    "shape": list(nonzero.shape),
                    "sparsity": round(here / nonzero.numel(), 6),
                    "weights": nonzero.numel(),
                    "patterns": patterns,
                }
            )
    weights = sum(layer["weights"] for layer in layers)
    targeted_zeros = sum(layer["sparsity"] * layer["weights"] for layer in layers)
    facts = {
        "sparsity": round(targeted_zeros / weights, 6) if weights else 0.0,
        "total_sparsity": round(zeros / total, 6) if total else 0.0,
        "layers": layers,
        "precision": {dtype: round(count / total, 6) for dtype, count in precision.most_common()},
        "size_bytes": checkpoint.file_bytes,
    }
    if packed is not None:
        scheme = packed.scheme
        facts["quantization"] = {
            "format": scheme.format,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
        }
    return facts
