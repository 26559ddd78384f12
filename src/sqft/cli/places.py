"""Where single commands put what has no place of its own, and find what an earlier call of them has fixed."""

from __future__ import annotations

import argparse
import json
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.artifact import DESCRIPTION, MANIFEST, digest_input, partial_of
from sqft.digests import digest_text
from sqft.disk import read_json
from sqft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import DataConfig


def localize(model: str, beside: Path, revision: str | None = None) -> Path:
    """Return a model's local folder; what must be unpacked goes beside the result, each file in a folder of its own."""
    from sqft.model.sources import local_folder

    reference = model if model.startswith("package:") else str(Path(model).expanduser().absolute())
    return local_folder(model, beside / f"{Path(model).stem}-{digest_text(reference)[:8]}", revision)


def result_file(options: argparse.Namespace, command: str, *inputs: Path) -> Path:
    """Return where a result goes, in a folder that can be written: --out, else a file for these arguments and bytes.

    Args:
        options: of the command.
        command: its name.
        inputs: the folders that the result is of, the model first.

    Raises:
        InputError: it cannot be written there.
    """
    out: Path | None = options.out
    inputs = tuple(path.expanduser() for path in inputs)
    if out is None:
        shown = ("command", "json", "out", "threads", "verbose")  # these change no result
        given = {name: str(value) for name, value in vars(options).items() if name not in shown}
        # Another content is another result, which must not find the place taken by that of the one before.
        given["bytes"] = " ".join(digest_input(path) for path in inputs if path.exists())
        folder = inputs[0].absolute()
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


def dated(data: DataConfig, tokenizer: PreTrainedTokenizerBase, out: Path) -> DataConfig:
    """Return the data with the date that chats are told: what work in `out` was told before, else now.

    The same command goes on tomorrow with the questions that it asked today.
    """
    from sqft.data.chat import with_date

    for file in (out, out / MANIFEST, partial_of(out) / DESCRIPTION):
        if file.is_file() and (found := _date_in(read_json(file))):
            return data if data.date else data.model_copy(update={"date": found})
    return with_date(data, tokenizer, datetime.now())


def _date_in(value: Any) -> str | None:
    """Return the first `date` of the settings of data in a record."""
    if not isinstance(value, dict):
        return None
    if "task" in value and isinstance(value.get("date"), str):
        return str(value["date"])
    return next((found for item in value.values() if (found := _date_in(item))), None)
