r"""Your own rows: files, a folder of them (:mod:`sqft.data.files`), or any Hub data set.

A row is read by the first of these that applies: `data.template` (:mod:`sqft.data.placeholders`), chat `messages`
(:mod:`sqft.data.chat`), `prompt` and `completion`. Every bad line is reported with its file and number before anything
is computed; only blank lines are skipped. Text that UTF-8 cannot encode is bad too: half a character, which JSON can
contain (`\ud83d`) and no tokenizer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from sqft.data.chat import chat_example, refuse_inputs
from sqft.data.files import as_row
from sqft.data.placeholders import fill, names, parse
from sqft.data.tasks import Example, Row
from sqft.errors import InputError, Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import Template

SHOWN_PROBLEMS = 10
T = TypeVar("T")


def build_examples(rows: Iterable[tuple[str, Any]], build: Callable[[Row], Example], where: str) -> list[Example]:
    """Turn rows into examples, and report all that fail.

    Args:
        rows: place and content of each, as :func:`sqft.data.files.read_rows` yields them.
        build: the task's wording.
        where: names the data in messages.

    Raises:
        InputError: there is no row, or some are malformed; the first ten are listed, the others counted.
    """

    def checked(row: Row) -> Example:
        example = build(row)
        if not example.prompt.strip() or not example.answer.strip():
            raise ValueError("has an empty prompt or an empty answer")
        if not all(choice.strip() for choice in example.choices):
            raise ValueError(f"one of its {len(example.choices)} choices is empty")
        check_text("prompt", example.prompt)
        check_text("answer", example.answer)
        check_text("question", example.question)
        for name, texts in (("choices", example.choices), ("contexts", example.contexts)):
            for text in texts:
                check_text(f"text among its {name}", text)
        return example

    return read_each(rows, checked, where)


def read_each(rows: Iterable[tuple[str, Any]], read: Callable[[Row], T], where: str) -> list[T]:
    """Return what is read from each row, and report all rows that cannot be read.

    Args:
        rows: place and content of each.
        read: what reads one; its ValueError, KeyError and the like are the row's.
        where: names the data in messages.

    Raises:
        InputError: as for :func:`build_examples`.
    """
    found: list[T] = []
    bad: list[str] = []
    for place, content in rows:
        row: Row = {}
        try:
            row = as_row(content)
            found.append(read(row))
        except InputError:
            raise  # of the data as a whole, not of this row
        except KeyError as error:
            bad.append(f"{place}: has no column {error.args[0]!r}; its columns are {names(row)}")
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            bad.append(f"{place}: {error}")
    if bad:
        with Problems(f"{where}, {len(bad)} of {len(bad) + len(found)} rows are malformed") as problems:
            for message in bad[:SHOWN_PROBLEMS]:
                # What cannot be encoded cannot be printed either.
                problems.add(message.encode("utf-8", "backslashreplace").decode())
            if len(bad) > SHOWN_PROBLEMS:
                problems.add(f"and {len(bad) - SHOWN_PROBLEMS} more")
    if not found:
        raise InputError(f"{where}: has no rows")
    return found


def check_text(name: str, text: str) -> None:
    """Refuse a text that UTF-8 cannot encode.

    Raises:
        ValueError: it has half a character, which and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"its {name} has half a character (U+{ord(text[error.start]):04X}, character {error.start + 1}), as where "
            "a text was cut inside an emoji; correct it"
        ) from error


def own_builder(
    template: Template | None,
    tokenizer: PreTrainedTokenizerBase | None,
    where: str,
    *,
    date: str | None = None,
    chat_template: bool = False,
) -> Callable[[Row], Example]:
    """Return the function that reads rows of the user's own data.

    Args:
        template: how a row reads, if the recipe says so.
        tokenizer: needed for chat rows.
        where: names the data in messages.
        date: the date for chat templates that ask for one.
        chat_template: whether prompts are put into the chat template afterwards; chat rows are in it already.

    Raises:
        InputError: the template's braces do not fit.
    """
    for setting, text in (("prompt", template.prompt), ("completion", template.completion)) if template else ():
        try:
            parse(text)
        except ValueError as error:
            raise InputError(f"data.template.{setting} {text!r}: {error}") from error

    def build(row: Row) -> Example:
        if template is not None:
            return Example(fill(template.prompt, row), fill(template.completion, row))
        if "messages" in row:
            if chat_template:
                raise InputError(f"{where}: its rows are chats already; set data.chat_template to false")
            if tokenizer is None or not getattr(tokenizer, "chat_template", None):
                raise InputError(
                    f"{where}: its rows are chats (column messages), and the model's tokenizer has no chat template; "
                    "use an instruction-tuned model, or give prompt and completion columns"
                )
            return chat_example(row, tokenizer, date)
        example = _prompt_and_completion(row)
        if chat_template:
            refuse_inputs(row)
        return example

    return build


def _prompt_and_completion(row: Row) -> Example:
    """Return the example of a row with these columns.

    Raises:
        ValueError: one is absent or no text.
    """
    if "prompt" not in row and "completion" not in row:
        raise ValueError(
            f"has neither prompt and completion nor messages; its columns are {names(row)}: "
            "say in data.template how they read"
        )
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str):
            raise ValueError(f"its {column} is {type(row[column]).__name__}, not text")
    return Example(row["prompt"], row["completion"])
