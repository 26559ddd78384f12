"""SHA-256 of files, folders and inputs.

A digest is always computed from bytes, never taken from a manifest. Within a process a file is hashed once, as long as
device, inode, size and both times stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from sqft.errors import InputError
from sqft.progress import progress

TEMPLATES = "additional_chat_templates"
"""Where a tokenizer with several chat templates keeps them (transformers' CHAT_TEMPLATE_DIR)."""

_Stamp = tuple[int, int, int, int, int]
_known: dict[_Stamp, str] = {}


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: str | Path) -> _Stamp:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises:
        InputError: it cannot be read, or something writes to it at the same time.
    """
    try:
        stamp = _stamp(path)
        if stamp in _known:
            return _known[stamp]
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if _stamp(path) != stamp:
            raise InputError(f"{path}: changes while it is read; wait until whatever writes it is done")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    _known[stamp] = found
    return found


def digest_files(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return {name relative to the folder: SHA-256}, with a progress bar over their bytes."""
    files = sorted(files)
    sizes = {path: path.stat().st_size for path in files}
    found = {}
    with progress(sum(sizes.values()) // 1_000_000, f"hashing {folder.name}", "MB") as advance:
        for path in files:
            found[str(path.relative_to(folder))] = digest_file(path)
            advance(sizes[path] // 1_000_000)
    return found


def file_digests(folder: Path) -> dict[str, str]:
    """Return {relative name: SHA-256} of all files of a folder but the hidden ones."""
    return digest_files(
        folder,
        [
            p
            for p in folder.rglob("*")
            if p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts)
        ],
    )


def model_files(folder: Path) -> list[Path]:
    """Return the files that define a model or adapter folder.

    Documents (*.md), hidden files, and subfolders do not count: an edited README or an adapter inside
    does not change the model. The folder of named chat templates counts, since prompts depend on it, and so do the
    masks and starting weights in `sqft/`.
    """
    places = [folder, folder / TEMPLATES]
    found = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()]
    found += (folder / "sqft").glob("*.safetensors")
    return sorted(path for path in found if not path.name.startswith(".") and not is_document(path.name))


def is_document(name: str) -> bool:
    """Tell whether a file is for readers alone."""
    return name.endswith(".md")


def digest_names(digests: dict[str, str]) -> str:
    """Return one digest of {name: digest}."""
    return digest_text(json.dumps(digests, sort_keys=True))
