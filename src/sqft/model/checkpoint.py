"""A model folder's tensors on disk: read one at a time, replaced in place, never all in memory.

Pruning and float merging change values, not names, shapes or dtypes. A new folder is therefore a copy of the old one
whose changed tensors are overwritten at their own offsets: memory stays at one tensor, everything else (sharding,
names, metadata, tokenizer, config) is the original's to the byte.

Layout of a safetensors file: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}},
then the data.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sqft.core.mask import finite
from sqft.errors import InputError, NumericalError, Problems

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `file` within the folder, byte range `start:stop` of that file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a model folder by their on-disk names.

    Raises:
        InputError: no safetensors, a shard that the index names is missing, or a file is cut short; all at once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        with Problems(f"model {self.folder}") as problems:
            for file in self._files(problems):
                self._read_header(file, problems)

    def _files(self, problems: Problems) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError) as error:
                problems.add(f"{INDEX} is not a shard index ({error}); download it again")
                return []
            for name in names:
                if not (self.folder / name).is_file():
                    problems.add(f"shard {name} is missing, though {INDEX} names it; download it again")
            return [name for name in names if (self.folder / name).is_file()]
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            pickles = [path.name for path in self.folder.glob("*.bin")]
            hint = f"; it has {pickles[0]}, a pickle: convert it with save_pretrained first" if pickles else ""
            problems.add(f"has no *.safetensors{hint}")
        return names

    def _read_header(self, file: str, problems: Problems) -> None:
        path = self.folder / file
        size = path.stat().st_size
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                problems.add(
                    f"{file} is cut short: its header needs {8 + length} bytes, it has {size}; download it again"
                )
                return
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
        if end > size:
            problems.add(f"{file} is cut short: its tensors need {end} bytes, it has {size}; download it again")
            return
        for name, value in header.items():
            start, stop = (8 + length + offset for offset in value["data_offsets"])
            self.entries[name] = Entry(file, _DTYPES[value["dtype"]], tuple(value["shape"]), start, stop)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as a copy of its own: a memory-mapped view would keep the file's pages resident."""
        entry = self.entries[name]
        try:
            with safe_open(str(self.folder / entry.file), framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name).clone()
        except SafetensorError as error:
            raise InputError(f"model {self.folder}: {entry.file} cannot be read: {error}; download it again") from error
        return tensor

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor in place, in its own dtype and shape.

        Raises:
            ValueError: the shape or dtype is not the stored one.
        """
        entry = self.entries[name]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(
                f"{name}: stored as {entry.dtype} {list(entry.shape)}, given {tensor.dtype} {list(tensor.shape)}"
            )
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with open(self.folder / entry.file, "r+b") as stream:
            stream.seek(entry.start)
            stream.write(data.data)

    def check_finite(self, names: list[str] | None = None) -> None:
        """Refuse NaN and Inf before any long work.

        Raises:
            NumericalError: names every tensor that has one, with how many.
        """
        bad = []
        for name in names if names is not None else list(self.entries):
            if not self.entries[name].dtype.is_floating_point or self.entries[name].dtype.itemsize < 2:
                continue
            tensor = self.read(name)
            if not finite(tensor):
                wrong = int((~torch.isfinite(tensor)).sum())
                bad.append(f"{name} has {wrong} NaN or Inf of {tensor.numel()} values")
        if bad:
            shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more tensors" if len(bad) > 5 else "")
            raise NumericalError(f"model {self.folder}: {shown}; the checkpoint is broken, get it again")


def copy_model(source: Path, target: Path) -> Checkpoint:
    """Copy a model folder's own files (not `sqft/`, not other formats' weights) and open the copy for writing."""
    checkpoint = Checkpoint(source)
    shards = {entry.file for entry in checkpoint.entries.values()}
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
        if path.is_file() and (path.name in shards or not is_weight) and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    return Checkpoint(target)
