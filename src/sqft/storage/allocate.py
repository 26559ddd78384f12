"""Safetensors files made in their full size first, to be written in place tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.storage.checkpoint import INDEX, WEIGHTS, Checkpoint, Layout
from sqft.storage.dtypes import DTYPE_NAMES


def allocate(folder: Path, layout: Mapping[str, Layout], *, shard_bytes: int = 4_000_000_000) -> Checkpoint:
    """Make a folder's safetensors files with these tensors, all zero, to be written in place one by one.

    A stage whose tensors have other names or shapes than its input's can so write them as they come, in any order,
    with no more than one in memory.

    Args:
        folder: an existing folder.
        layout: {name: (dtype, shape)}.
        shard_bytes: largest size of a file's data, unless one tensor is larger.
    """
    shards: list[dict[str, Layout]] = [{}]
    size = 0
    for name, (dtype, shape) in layout.items():
        needed = math.prod(shape) * dtype.itemsize
        if size + needed > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += needed
    total = len(shards)
    files = [WEIGHTS] if total == 1 else [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    for file, part in zip(files, shards, strict=True):
        allocate_file(folder / file, part)
    if total > 1:
        sizes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
        index = {name: file for file, part in zip(files, shards, strict=True) for name in part}
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": sizes}, "weight_map": index}, indent=2) + "\n"
        )
    return Checkpoint(folder)


def allocate_file(path: Path, layout: Mapping[str, Layout], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file with these tensors, all zero; the file system stores no zeros that are not written.

    Args:
        path: the file.
        layout: {name: (dtype, shape)}.
        metadata: text beside the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    # Wide dtypes first keeps every tensor aligned to its own width, as safetensors' own writer does.
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
