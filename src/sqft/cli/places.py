"""Where single commands put what has no place of its own: unpacked models, and results without --out."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from sqft.digests import digest_text
from sqft.errors import InputError


def localize(model: str, beside: Path) -> Path:
    """Return a model's local folder; what must be unpacked goes beside the result, each file in a folder of its own."""
    from sqft.model.load import localize as as_folder

    reference = model if model.startswith("package:") else str(Path(model).absolute())
    return as_folder(model, beside / f"{Path(model).stem}-{digest_text(reference)[:8]}")


def result_file(options: argparse.Namespace, command: str, model: Path) -> Path:
    """Return where a result goes, in a folder that can be written: --out, else a file for these very arguments.

    Raises:
        InputError: it cannot be written there.
    """
    out: Path | None = options.out
    if out is None:
        shown = ("command", "json", "out", "threads", "verbose")  # these change no result
        given = {name: str(value) for name, value in vars(options).items() if name not in shown}
        folder = model.absolute()
        name = "-".join(part for part in (folder.parent.name, folder.name) if part)
        out = Path("runs") / command / f"{name}-{digest_text(json.dumps(given, sort_keys=True))[:8]}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        reason = "it is a folder" if out.is_dir() else "" if os.access(out.parent, os.W_OK) else "permission denied"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise InputError(f"{out}: no result can be written there ({reason}); choose another --out")
    return out
