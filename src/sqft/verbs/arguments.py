"""What the verbs do alike with their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from sqft.artifact import MANIFEST, Artifact
from sqft.data.tasks import question_key
from sqft.disk import local_path
from sqft.errors import InputError
from sqft.recipe import CalibrationConfig, Config, DataConfig, parse_config
from sqft.verbs.places import fix_date

if TYPE_CHECKING:
    import torch

    from sqft.context import Context
    from sqft.data.tasks import Example, Task

Source: TypeAlias = "str | Mapping[str, Any] | DataConfig"
ConfigT = TypeVar("ConfigT", bound=Config)


class Result(dict[str, Any]):
    """A stage's JSON result as a dict; `path` is the file that holds it."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path


@overload
def as_path(path: str | Path) -> Path: ...


@overload
def as_path(path: str | Path | None) -> Path | None: ...


def as_path(path: str | Path | None) -> Path | None:
    """Return a path with `~` as the home folder."""
    return None if path is None else local_path(path)


def parse(model: type[ConfigT], values: Mapping[str, Any], verb: str) -> ConfigT:
    """Return the settings of a verb.

    Raises:
        InputError: every problem; an unknown name with the nearest right one.
    """
    if misplaced := [name for name in values if name in DataConfig.model_fields and name not in model.model_fields]:
        raise InputError(f"{verb}: {misplaced[0]} is a setting of the data; write data={{{misplaced[0]!r}: ...}}")
    return parse_config(model, dict(values), verb)


def given(data: Source) -> dict[str, Any]:
    """Return the settings of the data that were given."""
    if isinstance(data, DataConfig):
        return data.model_dump(exclude_unset=True)
    return {"task": data} if isinstance(data, str) else dict(data)


def as_data(data: Source) -> DataConfig:
    """Return the settings of the data.

    Raises:
        InputError: every problem; an unknown name with the nearest right one.
    """
    return data if isinstance(data, DataConfig) else parse_config(DataConfig, given(data), "data")


def as_flags(data: Source | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given as the command line names it, so that both find one result."""
    return {f"set:{name}": value for name, value in {**(given(data) if data else {}), **settings}.items()}


def calibrate(
    context: Context, folder: Path, config: CalibrationConfig | None, data: Source | None, out: Path
) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
    """Return calibration tokens and what they were drawn from; None where no text is needed.

    Raises:
        InputError: text is needed, and none was given.
    """
    if config is None:
        return None, None
    if data is None and config.data == "task":
        raise InputError(
            "--task NAME or --calibration.data FILE is needed (in Python data=NAME or calibration={'data': FILE}): "
            "this method looks at text to see which inputs each weight meets"
        )
    source = None if data is None else fix_date(as_data(data), context.tokenizer(folder), out)
    drawn = {"data": source and source.model_dump(mode="json"), "calibration": config.model_dump(mode="json")}
    return context.calibration(folder, config, source), drawn


def refuse_trained_on(
    adapter: Path, rows: Sequence[tuple[Task, Sequence[Example]]], context: Context, base: Path
) -> None:
    """Refuse to select on questions that an adapter of ours was trained on."""
    if not (adapter / MANIFEST).is_file():
        return
    manifest = Artifact.open(adapter).manifest
    source = manifest["config"].get("data", {}).get("data")
    if source is None:
        return
    data, read = parse_config(DataConfig, source, str(adapter)), context.data(base)
    fold = read.folds_punctuation(data)
    trained = {question_key(example, punctuation=fold) for example in read.examples(data, "train", manifest["seed"])}
    if shared := sum(question_key(example, punctuation=fold) in trained for _, part in rows for example in part):
        raise InputError(
            f"{adapter} was trained on {shared} of the {sum(len(part) for _, part in rows)} rows that the search would "
            f"select on; it trained with --validation-rows {data.validation_rows} and --test-rows {data.test_rows}: "
            "train with as many as the search is given"
        )
