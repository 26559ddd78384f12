r"""A task of your own in one YAML file: where its rows are, how a row reads, how an answer is judged.

    name: trivia
    data: trivia/                         # a folder of files, one file, or a Hub data set 'owner/name'
    metric: choice                        # choice, generate or exact, as the built-in tasks
    prompt: "Question: {question}\nAnswer:"
    choices: "{options}"                  # a column that holds a list, or a list of texts: ["{a}", "{b}", "{c}"]
    gold: label                           # column: the right one's index, its letter (A, B, ...) or its text

    metric: generate                      # the last number of what is generated is compared, or the one after `marker`
    prompt: "{question}"
    answer: "{answer}"
    until: ["\n\n"]
    max_new_tokens: 64

`{column}` is replaced by the row's value (:mod:`sqft.data.placeholders`). A space is put between prompt and answer
where the answer has none. `splits` names the source's splits where they are called otherwise: {test: validation}.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from sqft.data.files import split_name
from sqft.data.numbers import final_number
from sqft.data.placeholders import Column, fill, parse
from sqft.data.tasks import SPLITS, Example, Row, Task
from sqft.disk import local_path
from sqft.errors import InputError
from sqft.recipe import Config, parse_config, read_yaml


class TaskFile(Config):
    """The settings of a task file."""

    name: str = Field(description="name in results")
    data: str = Field(description="folder of files or one file, relative to the task file, or Hub 'owner/name'")
    metric: Literal["choice", "generate", "exact"] = Field(description="how an answer is judged")
    prompt: str = Field(description="what the model reads; {column} is replaced by the row's value")
    answer: str | None = Field(None, description="of generate and exact: what the model should write")
    choices: str | list[str] | None = Field(
        None, description="of choice: '{column}' holding a list, or a list of texts"
    )
    gold: str | None = Field(None, description="of choice: column with the right one's index, letter or text")
    marker: str = Field("", description="of generate: text that the number follows, after a space")
    until: list[str] = Field([], description="of generate: texts that end an answer")
    max_new_tokens: int = Field(64, ge=1, description="of generate: tokens at most")
    acc_norm: bool = Field(False, description="of choice: report accuracy by length too")
    splits: dict[Literal["train", "validation", "test"], str] = Field({}, description="the source's names of splits")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.metric == "choice" and (self.choices is None or self.gold is None):
            raise ValueError("metric choice needs choices and gold")
        if self.metric != "choice" and self.answer is None:
            raise ValueError(f"metric {self.metric} needs answer")
        choices = [self.choices] if isinstance(self.choices, str) else self.choices or []
        for text in (self.prompt, self.answer or "", *choices):
            try:
                parse(text)
            except ValueError as error:
                raise ValueError(f"{text!r} {error}") from error
        return self


def is_task_file(name: str) -> bool:
    """Tell whether data.task names a task file."""
    return name.endswith((".yaml", ".yml"))


def load_task_file(path: Path) -> Task:
    """Return the task that a YAML file describes.

    Raises:
        InputError: it cannot be read, or its settings are wrong; all problems are listed.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"task file {path}: cannot be read as YAML ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"task file {path}: holds {type(values).__name__}, not a mapping of settings")
    settings = parse_config(TaskFile, values, f"task file {path}")
    rows = path.parent / local_path(settings.data)
    local = rows.exists() or settings.data.startswith((".", "/", "~")) or bool(split_name(settings.data)[1])
    return Task(
        settings.name,
        settings.metric,
        lambda row: _build(settings, row),
        {**SPLITS, **settings.splits},
        hub=None if local else (settings.data, None),
        rows=str(rows) if local else "",
        acc_norm=settings.acc_norm,
        marker=settings.marker,
        until=tuple(settings.until),
        max_new_tokens=settings.max_new_tokens,
    )


def _build(settings: TaskFile, row: Row) -> Example:
    prompt = fill(settings.prompt, row)
    if settings.metric != "choice":
        assert settings.answer is not None
        answer = _spaced(prompt, fill(settings.answer, row))
        number = final_number(answer, settings.marker) if settings.metric == "generate" else 0
        if number is None or not math.isfinite(number):
            after = f" after the marker {settings.marker!r} and a space" if settings.marker else ""
            raise ValueError(f"its answer {answer!r} has no number{after} for metric generate to compare; use exact")
        return Example(prompt, answer)
    choices = _choices(settings, row)
    gold = _gold(row[cast("str", settings.gold)], choices)
    answers = tuple(_spaced(prompt, choice) for choice in choices)
    return Example(prompt, answers[gold], answers, gold)


def _spaced(prompt: str, answer: str) -> str:
    return answer if answer[:1].isspace() or prompt[-1:].isspace() else f" {answer}"


def _choices(settings: TaskFile, row: Row) -> list[str]:
    if isinstance(settings.choices, list):
        return [fill(choice, row) for choice in settings.choices]
    pieces = parse(settings.choices or "")
    found: Any = pieces[0].of(row) if len(pieces) == 1 and isinstance(pieces[0], Column) else None
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(choice, str) for choice in found):
        raise ValueError(f"choices {settings.choices!r} name no column that holds a list of at least two texts")
    return found


def _gold(value: Any, choices: list[str]) -> int:
    """Return the index of the right choice: an index, a letter, or the choice's text."""
    if value in choices:
        return choices.index(value)
    index = value
    if isinstance(value, str):
        index = ord(value.upper()) - ord("A") if re.fullmatch("[A-Za-z]", value) else -1
        index = int(value) if value.isdecimal() else index
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise ValueError(
            f"its gold {value!r} is neither an index nor a letter nor a text of its {len(choices)} choices"
        )
    return index
