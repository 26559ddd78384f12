"""Write a quantised model in another runtime's format, every weight to the bit, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from sqft.errors import InputError
from sqft.stages.export import to_gguf, to_openvino

Format = Literal["gguf", "openvino"]
FORMATS: tuple[Format, ...] = get_args(Format)


def run(model: Path, out: Path, form: Format | None = None, place: Path | None = None) -> dict[str, Any]:
    """Export a model folder.

    Args:
        model: folder of a quantised model.
        out: the file (GGUF) or folder (OpenVINO) to make.
        form: the format; None is GGUF, whose name ends in .gguf.
        place: the format's converter; None is the pinned one.

    Returns:
        The proof.

    Raises:
        InputError: no such format, the model cannot be exported (every reason), or the proof failed; there is then
            nothing at `out`.
    """
    if form not in (None, *FORMATS):
        raise InputError(f"--format {form}: is none; the formats are {', '.join(FORMATS)}")
    return to_openvino.run(model, out, place) if form == "openvino" else to_gguf.run(model, out, place)
