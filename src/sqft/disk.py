"""Atomic file operations: reading and writing JSON, deleting, syncing to disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sqft.errors import InputError

_DEEPEST = 100
_LARGEST = 10_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        refuse_depth(value)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def refuse_depth(value: Any) -> None:
    """Refuse data that cannot be traversed: nested too deeply, or larger than any settings.

    A few lines of YAML with references can expand to billions of parts, or be recursive.

    Raises:
        ValueError: says which.
    """
    parts: list[tuple[Any, int]] = [(value, 0)]
    seen = 0
    while parts:
        part, depth = parts.pop()
        seen += 1
        if depth > _DEEPEST or seen > _LARGEST:
            raise ValueError("is nested too deeply" if depth > _DEEPEST else f"has more than {_LARGEST} parts")
        if isinstance(part, dict | list):
            inner = part.values() if isinstance(part, dict) else part
            parts.extend((one, depth + 1) for one in inner)


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is whole or unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as stream:
        json.dump(value, stream, indent=2, sort_keys=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse a stage that would fill the disk.

    Raises:
        InputError: less than `needed_bytes` are free where `folder` will be.
    """
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise InputError(
            f"{folder}: {what} needs {needed_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; "
            "free some or choose another --out"
        )


def discard(path: Path) -> None:
    """Delete a file or folder, renamed first: half deleted, it must not look complete."""
    if path.is_dir() and not path.is_symlink():
        trash = path if path.name.endswith(".trash") else path.with_name(f"{path.name}.trash")
        if trash != path:
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error means a full disk; safetensors and torch say it only in their message."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def sync_all(folder: Path) -> None:
    """Force a folder's files to disk, so that the rename that follows never shows a half-written one."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_path(text: str | Path) -> Path:
    """Return a path with a leading `~` as the home folder. A file may be called ~x: without such a user it stays."""
    return Path(os.path.expanduser(text))
