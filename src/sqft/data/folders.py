"""Folders of your own rows: one file per split, such as `train.jsonl` or `train.parquet`.

A file of another name is not read. Where a split is missing, the error names a file that may be meant, such as
`val.jsonl`, and its expected name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sqft.data.files import split_name
from sqft.errors import InputError

if TYPE_CHECKING:
    from sqft.data.tasks import Split

_MEANT: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "tuning", "finetune"), "train"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "development", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "tests", "holdout", "heldout"), "test"),
}


def split_file(folder: Path, name: str) -> Path | None:
    """Return the file of a split that is called `name`, None if there is none.

    Raises:
        InputError: there are several.
    """
    found = [file for file in _files(folder) if split_name(file.name)[0] == name]
    if len(found) > 1:
        both = ", ".join(file.name for file in found)
        raise InputError(f"data {folder}: has {len(found)} files for one split, {both}; keep one of them there")
    return found[0] if found else None


def misnamed(folder: Path, named: Mapping[Split, str], split: Split) -> str:
    """Return a hint at a file of the folder that may be meant as a missing split; empty if there is none.

    Args:
        folder: of rows.
        named: what the splits are called there.
        split: the one that is missing.
    """
    meant = [
        file.name
        for file in _files(folder)
        if split_name(file.name)[0] not in named.values() and _split_of(split_name(file.name)[0]) == split
    ]
    if not meant:
        return ""
    if len(meant) > 1:
        return f" ({len(meant)} files may be meant, {meant[0]} to {meant[-1]}: make one {named[split]} of them)"
    return f" ({meant[0]} would be {named[split]}{split_name(meant[0])[1]}: rename it)"


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if split_name(file.name)[1] and file.is_file())


def _split_of(stem: str) -> Split | None:
    """Return the split that a word of a file's name means, or is close to."""
    words = [word for word in re.split(r"[\W_\d]+", stem.lower()) if word]
    for word in words:
        if word in _MEANT:
            return _MEANT[word]
    near = [match for word in words for match in difflib.get_close_matches(word, _MEANT, n=1, cutoff=0.75)]
    return _MEANT[near[0]] if near else None
