"""Verbs that change a model's form and not its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqft.stages import pack as _pack
from sqft.verbs.arguments import as_path

if TYPE_CHECKING:
    from sqft.artifact import Artifact


def pack(model: str | Path, out: str | Path) -> Artifact:
    """Make a sparse model small: zeros of its pruned linears take one bit.

    Args:
        model: folder of a sparse model, 16-bit, INT8 or INT4.
        out: the folder to make.

    Returns:
        The archive with its manifest.

    Raises:
        InputError: no model folder, an archive already, or too few zeros to shrink.
    """
    return _pack.pack(as_path(model), as_path(out))


def unpack(archive: str | Path, out: str | Path) -> Path:
    """Give back the model that an archive was made of, file by file the same bytes.

    Args:
        archive: folder that :func:`pack` made.
        out: the folder to make.

    Returns:
        The folder.

    Raises:
        InputError: no archive, one that is damaged, or the folder exists.
    """
    return _pack.unpack(as_path(archive), as_path(out))
