"""A model folder's tensors on disk: read one at a time, replaced in place, never all in memory.

Pruning and float merging change values, not names, shapes or dtypes. A new folder is therefore a copy of the old one
whose changed tensors are overwritten at their own offsets: memory stays at one tensor, everything else (sharding,
names, metadata, tokenizer, config) is the original's to the byte.

Which files are the model's is transformers' rule, in every stage: `model.safetensors`, else the shards that
`model.safetensors.index.json` names. Nothing else is read, pruned or carried into an output. A file that is not there
may be in an archive (:mod:`sqft.storage.archive`), which is read as it is.

Layout of a safetensors file: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}},
then the data.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sqft import processes
from sqft.core.mask import finite
from sqft.digests import model_files
from sqft.disk import read_json
from sqft.errors import InputError, NumericalError, Problems
from sqft.storage.archive import ArchiveFile, open_archive, stored, unpack_file
from sqft.storage.dtypes import DTYPES, read_tensor

if TYPE_CHECKING:
    from sqft.storage.layouts import Packed

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".npy", ".pkl", ".pickle", ".ot", ".tflite", ".distcp", ".index.json",
)  # fmt: skip


Layout = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""


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
        InputError: no safetensors, an adapter beside them, a shard that the index names is missing or outside the
            folder, or a file is cut short; all at once.
    """

    def __init__(self, folder: str | Path, files: list[str] | None = None) -> None:
        """Read the headers of the model's files, or of the `files` given."""
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self._named: dict[str, str] = {}
        self._archives: dict[str, ArchiveFile] = {}
        with Problems(f"model {self.folder}") as problems:
            for file in self._files(problems) if files is None else files:
                self._read_header(file, problems)
            if not list(problems):
                self._check_index(problems)

    def _files(self, problems: Problems) -> list[str]:
        """Return the files that transformers opens."""
        if (self.folder / "adapter_config.json").is_file():
            problems.add(
                "holds an adapter too (adapter_config.json), with which transformers would open the model; move the "
                "adapter's files to a folder of their own, and merge it first if it is part of the model (sqft merge)"
            )
        if stored(self.folder / WEIGHTS) is not None:
            return [WEIGHTS]
        if (self.folder / INDEX).is_file():
            return self._shards(problems)
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        pickles = sorted(path.name for path in self.folder.glob("*.bin"))
        hint = "; download it again"
        if (self.folder / "quantize_config.json").is_file():
            hint = (
                f"; {others[0] if others else 'its weights'} beside a quantize_config.json is AutoGPTQ's first format: "
                f"name the file {WEIGHTS}, and put what quantize_config.json says into config.json as "
                'quantization_config, with "quant_method": "gptq"'
            )
        elif others:
            hint = f"; it has {others[0]}, which transformers does not open: rename it if it is the model"
        elif pickles:
            hint = f"; it has {pickles[0]}, a pickle: convert it with save_pretrained first"
        problems.add(f"has neither {WEIGHTS} nor {INDEX}{hint}")
        return []

    def _shards(self, problems: Problems) -> list[str]:
        """Return the files that the index names."""
        try:
            named = read_json(self.folder / INDEX)["weight_map"]
            names = sorted(set(named.values()))
            outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.add(f"{INDEX} is not a shard index ({error!r}); download it again")
            return []
        if outside:
            problems.add(f"{INDEX} names {', '.join(outside)}, outside the folder; download it again")
        missing = [name for name in names if name not in outside and stored(self.folder / name) is None]
        for name in missing:
            problems.add(f"shard {name} is missing, though {INDEX} names it; download it again")
        self._named = named
        return [name for name in names if name not in (*outside, *missing)]

    def _check_index(self, problems: Problems) -> None:
        """Compare the shards with what the index says lies in them."""
        absent = [
            name for name, file in self._named.items() if name not in self.entries or self.entries[name].file != file
        ]
        if absent:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            problems.add(f"{INDEX} names {', '.join(absent[:5])}{more}, not in the files it says; download it again")

    def _read_header(self, file: str, problems: Problems) -> None:
        path = self.folder / file
        archive = stored(path)
        if archive is not None and archive != path:
            self._archives[file] = open_archive(archive)
            self._add(file, self._archives[file].tensors, 0, problems)
            return
        size = path.stat().st_size
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                problems.add(
                    f"{file} is cut short: its header needs {8 + length} bytes, it has {size}; download it again"
                )
                return
            try:
                header = json.loads(stream.read(length))
                end = (
                    8
                    + length
                    + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
                )
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                problems.add(f"{file} has no readable header ({error}); download it again")
                return
        if end > size:
            problems.add(f"{file} is cut short: its tensors need {end} bytes, it has {size}; download it again")
            return
        try:
            with safe_open(str(path), framework="pt"):  # the library's own checks: shapes, offsets, overlaps
                pass
        except (SafetensorError, OSError) as error:
            problems.add(f"{file} is no valid safetensors file ({error}); download it again")
            return
        header.pop("__metadata__", None)
        self._add(file, header, 8 + length, problems)

    def _add(self, file: str, header: Mapping[str, Any], begin: int, problems: Problems) -> None:
        """Take the tensors of one file's header, whose data begins at a byte of it."""
        for name, value in header.items():
            if value["dtype"] not in DTYPES:
                problems.add(
                    f"{file}: {name} has dtype {value['dtype']}, which is not read; give a float or INT4 model"
                )
                continue
            if name in self.entries:
                problems.add(f"{name} lies in two files, {self.entries[name].file} and {file}; download it again")
            start, stop = (begin + offset for offset in value["data_offsets"])
            self.entries[name] = Entry(file, DTYPES[value["dtype"]], tuple(value["shape"]), start, stop)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that its float weights are stored in: that of the largest one that is no scale.

        Raises:
            InputError: it has no float weights.
        """
        floats = [
            entry
            for name, entry in self.entries.items()
            if entry.dtype.is_floating_point
            and entry.dtype.itemsize > 1  # FP8 is a format of quantised weights, not one to compute in
            and not name.endswith((".scales", ".weight_scale"))
        ]
        if not floats:
            raise InputError(f"model {self.folder}: none of its {len(self.entries)} tensors is of a float type")
        return max(floats, key=lambda entry: entry.stop - entry.start).dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    @property
    def archived(self) -> bool:
        """Whether some of its files lie in archives, which only sqft reads."""
        return bool(self._archives)

    @property
    def file_bytes(self) -> int:
        """Bytes of its files on disk, of archives as they are."""
        places = (stored(self.folder / file) for file in {entry.file for entry in self.entries.values()})
        return sum(place.stat().st_size for place in places if place is not None)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as a copy of its own: a memory-mapped view would keep the file's pages resident."""
        entry = self.entries[name]
        if entry.file in self._archives:
            return self._archives[entry.file].read(name, self)
        try:
            return read_tensor(self.folder / entry.file, entry.dtype, entry.shape, entry.start, entry.stop)
        except (OSError, RuntimeError) as error:
            raise InputError(f"model {self.folder}: {entry.file} cannot be read: {error}; download it again") from error

    def kept(self, name: str) -> torch.Tensor:
        """Return the mask that an archive holds of a weight, uint8 [O, ceil(I / 8)].

        Raises:
            KeyError: it lies in no archive.
        """
        return self._archives[self.entries[name].file].kept(name)

    def packed(self, name: str, *, read: bool = True) -> Packed | None:
        """Return a tensor as it lies in an archive, without its parts unless `read`; None of one in a plain file."""
        archive = self._archives.get(self.entries[name].file)
        return None if archive is None else archive.packed(name, read=read)

    def copy_file(self, file: str, target: Path) -> None:
        """Write one of the model's files elsewhere; out of an archive as it was before."""
        if file in self._archives:
            unpack_file(self._archives[file], target, self)
        else:
            shutil.copyfile(self.folder / file, target)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor in place, in its own dtype and shape; of several processes the first alone does.

        Raises:
            ValueError: the shape or dtype is not the stored one.
        """
        entry = self.entries[name]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(
                f"{name}: stored as {entry.dtype} {list(entry.shape)}, given {tensor.dtype} {list(tensor.shape)}"
            )
        if not processes.first():
            return
        # A copy: a view of one element may count as contiguous with a stride that bytes cannot be viewed through.
        data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy()
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
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.copy_file(file, target / file)
    if files != [WEIGHTS]:
        shutil.copyfile(source / INDEX, target / INDEX)
    copy_side_files(source, target)
    return Checkpoint(target)


@contextmanager
def plain_files(folder: str | Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Give a folder of plain files: this one, or of an archive an unpacked copy that goes afterwards.

    Args:
        folder: the model.
        without: tensors that the copy does not need; what is left of the model is then held in memory while written.
    """
    checkpoint = Checkpoint(folder)
    if not checkpoint.archived:
        yield Path(folder)
        return
    with TemporaryDirectory() as name:
        if without:
            rest = {tensor: checkpoint.read(tensor) for tensor in checkpoint.entries if tensor not in without}
            copy_side_files(Path(folder), Path(name))
            save_file(rest, Path(name) / WEIGHTS, metadata={"format": "pt"})
        else:
            copy_model(Path(folder), Path(name))
        yield Path(name)


def side_files(folder: Path) -> list[Path]:
    """Return the files beside a model's weights that it is used with: config, tokenizer, chat templates, code."""
    return [path for path in model_files(folder) if not path.name.endswith(_WEIGHT_SUFFIXES)]


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what lies beside a model's weights: config, tokenizer with its chat templates, licence."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [*side_files(source), *source.glob("*.md")]:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    _name_dtype(target / "config.json", Checkpoint(source).dtype)


def _name_dtype(config: Path, stored: torch.dtype) -> None:
    """Let config.json name the dtype that the weights have: any other would be a rounding of what was merged."""
    values = read_json(config)
    key, name = ("torch_dtype" if "torch_dtype" in values else "dtype"), str(stored).removeprefix("torch.")
    if values.get(key) not in (None, name):
        values[key] = name
        config.write_text(json.dumps(values, indent=2) + "\n")
