r"""Texts with `{column}` placeholders, filled from a row: `data.template` and task files.

The text between braces is the exact name of a column, in any script: `{question}`, `{вопрос}`. A name that the row does
not have is an error that lists its columns; so are `{ question }`, `{question:>5}`, `{0}` and `{}`, because a
placeholder that is not understood would appear in every prompt. Literal braces are doubled, as in Python:
`\boxed{{{answer}}}` gives \boxed{5}. JSON needs no doubling: a brace before a quotation mark (white space may come
between) and its closing brace are literal. `{"answer": "{answer}"}` gives {"answer": "5"}.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqft.data.tasks import Row

_JSON = re.compile(r'\{\s*"')
_PLAIN = re.compile(r"[^{}]*")
_DOUBLED = re.compile(r"(?<!\{)\{\{\s*([^{}]+?)\s*\}\}(?!\})")
_ESCAPE = "write {{ and }} for braces that are text"


@dataclass(frozen=True)
class Column:
    """A placeholder: the name of the column whose value takes its place."""

    name: str

    def of(self, row: Row) -> Any:
        """Return the row's value.

        Raises:
            ValueError: the row has no such column.
        """
        if self.name in row:
            return row[self.name]
        meant = next((name for name in row if name and name in re.split(r"[:!.\[\]]|\s+", self.name)), None)
        remedy = f"write {{{meant}}}, or {_ESCAPE}" if meant else _ESCAPE
        # What could be a column's name is taken for one; anything else may have been meant as text.
        raise ValueError(
            f"has no column {self.name!r}; its columns are {names(row)}"
            + ("" if self.name.isidentifier() else f" ({remedy})")
        )


def names(row: Row) -> str:
    """Return the names of a row's columns for a message."""
    return ", ".join(row) or "none"


@functools.cache
def parse(text: str) -> tuple[str | Column, ...]:
    """Return the pieces of a text: text as it stands, and placeholders.

    Raises:
        ValueError: a brace has no partner.
    """
    pieces: list[str | Column] = []
    opened = place = 0  # braces of JSON that are open
    while place < len(text):
        character = text[place]
        if character not in "{}":
            end = _end(text, place)
            pieces.append(text[place:end])
            place = end
        elif _JSON.match(text, place):
            opened, place = opened + 1, place + 1
            pieces.append("{")
        elif character == "}" and opened:
            opened, place = opened - 1, place + 1
            pieces.append("}")
        elif text.startswith(character * 2, place):
            pieces.append(character)
            place += 2
        elif character == "}":
            raise ValueError(f"has a closing brace that closes nothing, at character {place + 1}; {_ESCAPE}")
        else:
            end = _end(text, place + 1)
            if not text.startswith("}", end):
                raise ValueError(f"has a brace that is not closed, at character {place + 1}; {_ESCAPE}")
            pieces.append(Column(text[place + 1 : end]))
            place = end + 1
    if opened:
        raise ValueError(f"has {opened} more opening braces than closing ones; {_ESCAPE}")
    return tuple(pieces)


def fill(text: str, row: Row) -> str:
    """Return a text with each `{column}` replaced by the row's value.

    Raises:
        ValueError: the row lacks a column, or it is neither text nor a number; or a column stands in doubled braces,
            as templates of other tools write it.
    """
    for doubled in _DOUBLED.finditer(text):
        if doubled[1] in row:
            raise ValueError(f"{doubled[0]} would be the text {{{doubled[1]}}}; write {{{doubled[1]}}} for the column")
    return "".join(piece if isinstance(piece, str) else _written(piece.name, piece.of(row)) for piece in parse(text))


def _end(text: str, start: int) -> int:
    """Return where the next brace stands, or the text's end."""
    found = _PLAIN.match(text, start)
    return found.end() if found else start


def _written(name: str, value: Any) -> str:
    """Return a value as text; a number's text is read as the same number again."""
    if not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"its column {name!r} is {type(value).__name__}, not text or a number")
    if not isinstance(value, str) and not math.isfinite(value):
        raise ValueError(f"its column {name!r} is {value}, which is no number")
    return str(value)
