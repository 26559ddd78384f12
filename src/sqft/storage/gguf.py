"""The proof that a GGUF file holds the weights of a model folder, to the bit.

The file is read back with the gguf package, which dequantises by its own code. A row of weights in the file must be a
row s · (q − z) of the folder in float32, bit for bit. Rows may lie in another order (llama.cpp permutes those of q and
k), and a tensor may be several of the folder's linears behind each other; each linear must be there once, whole, and
nothing else. Rows are compared by their SHA-256, so that one tensor at a time is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.core.blocks import TYPES
from sqft.errors import InputError, Problems

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sqft.storage.integers import PackedCheckpoint

_AT_ONCE = 2**22
"""Weights dequantised at a time."""


def prove(file: Path, model: PackedCheckpoint) -> dict[str, Any]:
    """Compare every weight of a GGUF file with a quantised model folder's.

    Returns:
        {linears, weights: how many of them were found equal to the bit, type, bits: a weight's, bytes: of the file,
        matrices: float matrices whose rows are the folder's, vectors: equal ones, computed: vectors that the converter
        writes otherwise (Gemma's norms plus one)}.

    Raises:
        InputError: a tensor holds something else, or a linear is not there; all of them.
    """
    tensors = _tensors(file)
    left = {name: Counter(_linear_rows(model, name)) for name in _largest_first(model)}
    floats = _float_rows(model)
    types, matrices, vectors, computed = set(), 0, 0, 0
    with Problems(f"{file}: is not the model {model.folder}") as problems:
        for tensor in tensors:
            rows = list(_digests(_parts(tensor)))
            if tensor.tensor_type.name in TYPES:
                types.add(tensor.tensor_type.name)
                found = _take(Counter(rows), left)
                if not found:
                    problems.add(
                        f"{tensor.name} ({tensor.tensor_type.name}) holds rows that no linear of the folder has"
                    )
            elif len(tensor.shape) > 1:
                matrices += 1
                if strange := sum(row not in floats for row in rows):
                    problems.add(f"{tensor.name}: {strange} of its {len(rows)} rows are not in the folder")
            else:
                known = rows[0] in floats
                vectors, computed = vectors + known, computed + (not known)
        if left:
            problems.add(f"{len(left)} linears are not in it: {', '.join(sorted(left)[:5])}")
    (kind,) = types
    weights = sum(rows * columns for rows, columns in model.shapes.values())
    counts = {"linears": len(model.shapes), "weights": weights, "type": kind, "bits": TYPES[kind].bits}
    return counts | {
        "bytes": file.stat().st_size,
        "matrices": matrices,
        "vectors": vectors,
        "computed": computed,
    }


def _tensors(file: Path) -> list[Any]:
    from gguf import GGUFReader

    try:
        return list(GGUFReader(file).tensors)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{file}: is no readable GGUF file ({error})") from error


def _take(rows: Counter[bytes], left: dict[str, Counter[bytes]]) -> list[str]:
    """Take the linears out of `left` that a tensor's rows are; return their names, none if it has other rows too."""
    found = []
    for name, wanted in left.items():
        if all(rows[row] >= count for row, count in wanted.items()):
            rows = rows - wanted
            found.append(name)
    if rows:
        return []
    for name in found:
        del left[name]
    return found


def _largest_first(model: PackedCheckpoint) -> list[str]:
    """Return the linears, so that a small one is not taken for a part of a larger one."""
    return sorted(model.shapes, key=lambda name: -model.shapes[name][0])


def _linear_rows(model: PackedCheckpoint, name: str) -> Iterator[bytes]:
    codes, grid = model.read(name)
    return _digests([grid.dequantize(codes).numpy()])


def _float_rows(model: PackedCheckpoint) -> set[bytes]:
    """Return the rows of all the folder's tensors that are not quantised."""
    packed, checkpoint = model.stored_names(), model.checkpoint
    names = [n for n, e in checkpoint.entries.items() if n not in packed and e.dtype.is_floating_point]
    return {row for name in names for row in _digests([_matrix(checkpoint.read(name))])}


def _matrix(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().reshape(-1, tensor.shape[-1] if tensor.dim() else 1).numpy()


def _parts(tensor: Any) -> Iterator[np.ndarray]:
    """Yield some rows at a time of a tensor in the file, as float32."""
    from gguf.quants import dequantize

    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    step = max(1, _AT_ONCE // int(tensor.shape[0]))
    for start in range(0, len(data), step):
        yield dequantize(data[start : start + step], tensor.tensor_type)


def _digests(parts: Any) -> Iterator[bytes]:
    """Yield the SHA-256 of each row of float32 matrices."""
    for part in parts:
        for row in part:
            yield sha256(row.tobytes()).digest()
