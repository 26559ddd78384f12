"""Archives: safetensors files whose zeros take a bit or less, read in place, and turned back byte for byte.

`model.safetensors` becomes `model.packed.safetensors`, itself a plain safetensors file:

    X.mask, X.values, X.offsets   X in the bitmask layout of :mod:`sqft.core.sparse`
    X.patterns, X.values          X in the 2:4 layout
    X                             X as it was, where it has too few zeros

and nothing at all for a stored mask that its weight says, by its layout or by its zeros. All are padded to 8 bytes:
every part begins at a multiple of 8. The metadata `sqft.archive` holds the original file's header and SHA-256,
how each tensor lies here, and a CRC-32 of its masks, patterns and offsets. These are checked when the file is opened,
also against each other: a kernel that follows a wrong offset would read another row.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sqft.core.sparse import WORD, are_patterns, mask_bytes, row_ends, within
from sqft.errors import InputError
from sqft.storage.dtypes import DTYPE_NAMES, DTYPES, read_tensor
from sqft.storage.layouts import PARTS, Codes, Layout, Packed, Source, as_bytes, decode, kept_of, patterns_of, shape_of

SUFFIX = ".packed.safetensors"
METADATA = "sqft.archive"
VERSION = 1
_MASKS = (".mask", ".patterns")
_AT_ONCE = 1 << 26  # bytes copied at a time


def read_header(path: Path) -> tuple[str, int]:
    """Return a safetensors file's header as it stands, and where its data begins."""
    with open(path, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        return stream.read(length).decode(), 8 + length


def pack_file(
    source: Path,
    target: Path,
    sha256: str,
    pack: Callable[[str, torch.Tensor], Packed],
    advance: Callable[[int], Any] = lambda _: None,
) -> dict[str, int]:
    """Write the archive of one safetensors file, with one tensor in memory at a time.

    The header comes first in the file and is written last, when all it says is known. Its room is reserved, and filled
    with spaces.

    Args:
        source: the file.
        target: the archive to write.
        sha256: of the source, which :func:`unpack_file` compares.
        pack: returns the layout of a tensor, from its name.
        advance: called with the bytes of the source that are done.

    Returns:
        {layout: how many tensors have it}.
    """
    text, begin = read_header(source)
    tensors = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    room = _room(text, tensors)
    header: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    plain = []
    with safe_open(str(source), framework="pt") as stream, open(target, "wb") as out:
        out.seek(8 + room)
        place = 0
        for name, entry in tensors.items():
            packed = pack(name, stream.get_tensor(name))
            notes[name] = packed.note()
            if packed.layout == "plain":
                plain.append(name)
                continue
            for suffix, part in packed.parts.items():
                out.write(as_bytes(part))
                stop = place + part.numel() * part.itemsize
                header[name + suffix] = _entry(part, place, stop)
                place = stop
            advance(entry["data_offsets"][1] - entry["data_offsets"][0])
        with open(source, "rb") as data:
            # Wide ones first: each stays at a multiple of its own width.
            for name in sorted(plain, key=lambda name: -_width(tensors[name])):
                start, stop = tensors[name]["data_offsets"]
                header[name] = {**tensors[name], "data_offsets": [place, place + stop - start]}
                place += stop - start
                data.seek(begin + start)
                _copy(data, out, stop - start, advance)
        written = _header(header, notes, text, sha256)
        assert len(written) <= room, f"the header needs {len(written)} bytes, {room} are reserved"
        out.seek(0)
        out.write(struct.pack("<Q", room) + written.ljust(room))
    return {layout: sum(note["layout"] == layout for note in notes.values()) for layout in PARTS}


def _entry(part: torch.Tensor, start: int, stop: int) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [start, stop]}


def _width(entry: Mapping[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    count: int = math.prod(entry["shape"])
    return int(stop - start) // max(1, count)


def _room(text: str, tensors: Mapping[str, Any]) -> int:
    """Return bytes that are enough for an archive's header: that of one whose every matrix has three parts."""
    most = 10**15  # bytes, of any file
    header: dict[str, Any] = {}
    notes = {}
    for name, entry in tensors.items():
        parts = PARTS["bitmask"] if len(entry["shape"]) == 2 else ("",)
        header |= {name + part: {"dtype": "BF16", "shape": [most], "data_offsets": [most, most]} for part in parts}
        notes[name] = Packed("bitmask", {}, Codes(8, most, name + "_zero_point", False, 0), name).note() | {
            "crc32": 2**32
        }
    return (len(_header(header, notes, text, "0" * 64)) + 7) // 8 * 8


def _header(entries: Mapping[str, Any], notes: Mapping[str, Any], text: str, sha256: str) -> bytes:
    archive = {"version": VERSION, "sha256": sha256, "header": text, "tensors": notes}
    metadata = {"format": "pt", METADATA: json.dumps(archive, separators=(",", ":"))}
    return json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()


def _copy(source: Any, target: Any, count: int, advance: Callable[[int], Any]) -> None:
    while count:
        part = source.read(min(count, _AT_ONCE))
        target.write(part)
        advance(len(part))
        count -= len(part)


def unpack_file(archive: ArchiveFile, target: Path, source: Source) -> None:
    """Write the file that an archive was made of, with one tensor in memory at a time.

    Args:
        archive: the archive.
        target: the file to write.
        source: the archive's model.
    """
    with open(target, "wb") as out:
        text = archive.header.encode()
        out.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(archive.tensors, key=lambda name: archive.tensors[name]["data_offsets"]):
            out.write(as_bytes(archive.read(name, source)))


def place(file: Path) -> Path:
    """Return the name of a safetensors file's archive."""
    return file.with_name(file.stem + SUFFIX)


def stored(file: Path) -> Path | None:
    """Return a safetensors file if it is there, else its archive, else None."""
    # os.path's answer, because Path.is_file fails on a name that no file can have.
    return next((path for path in (file, place(file)) if os.path.isfile(path)), None)


def open_archive(path: Path) -> ArchiveFile:
    """Return an archive; one that has not changed since is not checked again."""
    stat = path.stat()
    return _opened(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _opened(path: Path, *_stamp: int) -> ArchiveFile:
    return ArchiveFile(path)


class ArchiveFile:
    """One archive file, checked.

    Attributes:
        path: the file.
        header: that of the original file, as it stood.
        sha256: of the original file.
        tensors: {name: entry of the original header}, in its order.

    Raises:
        InputError: no archive, another version, or its masks, offsets, counts and patterns contradict each other or
            their checksums.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="pt"):  # the library's own checks: shapes, offsets, overlaps
                pass
            text, self._begin = read_header(path)
            self._parts = json.loads(text)
            self._read_notes(json.loads(self._parts.pop("__metadata__")[METADATA]))
            for name in self.tensors:
                self._check(name)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: is no archive that can be read ({error}); pack the model again, or download it again"
            ) from error

    def _read_notes(self, archive: Mapping[str, Any]) -> None:
        if archive["version"] != VERSION:
            raise ValueError(f"version {archive['version']}, this sqft reads {VERSION}")
        self.header, self.sha256, notes = str(archive["header"]), str(archive["sha256"]), archive["tensors"]
        entries = json.loads(self.header)
        self.tensors: dict[str, dict[str, Any]] = {name: entries[name] for name in entries if name != "__metadata__"}
        self._crc = {name: notes[name].get("crc32", 0) for name in self.tensors}
        self._notes = {}
        for name in self.tensors:
            note = notes[name]
            codes = Codes(**note["codes"]) if "codes" in note else None
            self._notes[name] = Packed(note["layout"], {}, codes, note.get("weight"))

    def _check(self, name: str) -> None:
        """Compare the parts of a tensor with its checksum and with each other.

        Raises:
            ValueError: says what is wrong.
        """
        note = self._notes[name]
        if note.layout in ("plain", "mask", "nonzeros"):
            return
        shape = rows, columns = shape_of(tuple(self.tensors[name]["shape"]), note.codes)
        parts = {s: self._part(name + s) for s in PARTS[note.layout] if s != ".values"}
        here = replace(note, parts=parts)
        if here.crc() != self._crc[name]:
            raise ValueError(f"the checksum of {name} is not that of its {' and '.join(parts)}")
        if note.layout == "2:4":
            count = rows * columns // (2 if note.halves is None else 4)
            width = 3 * math.ceil(columns / 32)
            _check_shape(parts[".patterns"], (math.ceil(rows * width / 8) * 8,), f"{name}.patterns")
            if not are_patterns(patterns_of(here, *shape)):
                raise ValueError(f"{name} has a pattern that is none of the 6")
        else:
            mask, offsets = parts[".mask"], parts[".offsets"]
            _check_shape(mask, (rows, math.ceil(columns / WORD)), f"{name}.mask")
            _check_shape(offsets, (rows + rows % 2,), f"{name}.offsets")
            if bool((mask[:, -1] & ~within(columns)[-1]).any()):
                raise ValueError(f"{name}.mask keeps more than its {columns} columns")
            if not torch.equal(row_ends(mask, columns, group=note.halves), offsets[:rows].long()):
                raise ValueError(f"{name}.offsets are not what {name}.mask counts")
            count = int(offsets[rows - 1])
        found = math.prod(self._parts[f"{name}.values"]["shape"])
        if found - count not in range(8):
            raise ValueError(f"{name} has {found} values where {count} are counted")

    def _part(self, name: str) -> torch.Tensor:
        """Return a tensor of this file."""
        entry = self._parts[name]
        start, stop = (self._begin + offset for offset in entry["data_offsets"])
        return read_tensor(self.path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)

    def layout(self, name: str) -> Layout:
        """Return how a tensor lies here."""
        return self._notes[name].layout

    def packed(self, name: str, *, read: bool = True) -> Packed:
        """Return a tensor as it lies here, without its parts unless `read`."""
        note = self._notes[name]
        if not read:
            return note
        return replace(note, parts={suffix: self._part(name + suffix) for suffix in PARTS[note.layout]})

    def read(self, name: str, source: Source) -> torch.Tensor:
        """Return a tensor as it was; `source` is the archive's model."""
        entry = self.tensors[name]
        return decode(self.packed(name), tuple(entry["shape"]), DTYPES[entry["dtype"]], source)

    def kept(self, name: str) -> torch.Tensor:
        """Return the mask that a weight's layout holds, uint8 [O, ceil(I / 8)]."""
        note, shape = self._notes[name], tuple(self.tensors[name]["shape"])
        needed = {suffix: self._part(name + suffix) for suffix in PARTS[note.layout] if suffix in _MASKS}
        return mask_bytes(kept_of(replace(note, parts=needed), shape), shape_of(shape, note.codes)[1])


def _check_shape(tensor: torch.Tensor, wanted: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, and needs {list(wanted)}")
