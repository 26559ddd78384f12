"""Token windows for calibration and the token stream for perplexity.

Calibration text is one stream of tokens, split at a random offset into non-overlapping windows of exactly `length`
tokens, of which `samples` are drawn. If the tokenizer adds a BOS token, every window starts with it and has one text
token less. Models that were only trained with a BOS token (Gemma) have other activations without it.

Rows of a task are shuffled and joined by the EOS token, prompt and answer as in training, so that pruner and quantiser
see the activations of the task. A text too short for `samples` windows is repeated, with a log message, because
repeated windows add no information.

WikiText-2 is the published, already tokenised text. Calibration uses its validation part, perplexity its test part,
with rows joined by a blank line as in the GPTQ and Wanda papers.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from sqft.data.encode import beginning, encode, encode_prompt, ended, plain_tokens
from sqft.data.files import as_row, holds_rows, read_rows, read_text
from sqft.data.load import Data
from sqft.data.own import build_examples, check_text, own_builder, read_each
from sqft.data.sources import FOLDER_VARIABLE, data_folder
from sqft.disk import local_path
from sqft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.data.tasks import Example, Row
    from sqft.recipe import CalibrationConfig, DataConfig

logger = logging.getLogger(__name__)

_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-v1")
_WIKITEXT_FILES = {"validation": "valid.txt", "test": "test.txt"}


def calibration_tokens(
    config: CalibrationConfig,
    data: DataConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    read: Data | None = None,
) -> torch.Tensor:
    """Return windows of calibration text.

    Args:
        config: source, number of samples, tokens a sample.
        data: the recipe's data, for source 'task'.
        tokenizer: the model's.
        seed: chooses rows and windows.
        read: the run's data cache; None reads without one.

    Returns:
        int64 [samples, length].

    Raises:
        InputError: the source does not exist or has no tokens.
    """
    first = beginning(tokenizer)
    if config.length <= len(first):
        raise InputError(
            f"calibration.length is {config.length}, which the tokenizer's {len(first)} beginning tokens fill; raise it"
        )
    needed = config.samples * config.length
    # Not for secrets: a seeded, portable choice of rows.
    generator = random.Random(seed)  # noqa: S311
    read = read or Data(tokenizer)
    enough = None if _is_text(config.data, read) else needed
    stream = _take(_source(config, data, read, seed, generator), enough)
    if not stream:
        raise InputError(f"calibration data {config.data}: has no tokens; choose another source")
    if len(stream) < needed:
        logger.info(
            "calibration: %s has %d tokens, fewer than %d samples of %d; its text is repeated %.1f times",
            config.data,
            len(stream),
            config.samples,
            config.length,
            needed / len(stream),
        )
        stream = (stream * (needed // len(stream) + 1))[:needed]
    offset = generator.randrange(min(config.length, len(stream) - needed + 1))
    windows = list(cut_windows(stream[offset:], config.length, first))
    return torch.tensor(generator.sample(windows, config.samples), dtype=torch.int64)


def cut_windows(stream: Sequence[int], length: int, first: Sequence[int]) -> Iterator[list[int]]:
    """Yield non-overlapping windows of `length` tokens; each starts with `first`, which is not doubled."""
    first, start = list(first), 0
    while True:
        begun = [] if list(stream[start : start + len(first)]) == first else first
        end = start + length - len(begun)
        if end > len(stream):
            return
        yield [*begun, *stream[start:end]]
        start = end


def perplexity_tokens(
    name: str, split: Literal["validation", "test"], tokenizer: PreTrainedTokenizerBase, read: Data | None = None
) -> torch.Tensor:
    """Return a whole text as one stream of tokens, without special tokens: int64 [tokens].

    Args:
        name: 'wikitext2'.
        split: its part.
        tokenizer: the model's.
        read: the run's data cache; None reads without one.

    Raises:
        InputError: the text is unknown or not found.
    """
    if name != "wikitext2":
        raise InputError(f"perplexity text {name!r}: known is wikitext2")
    tokens = plain_tokens(tokenizer, _wikitext(split, read or Data(tokenizer)))
    return torch.tensor(tokens, dtype=torch.int64)


def _is_text(source: str, read: Data) -> bool:
    """Return whether a source is one plain text, which is read as a whole, and not rows in random order."""
    path = local_path(source)
    # The suffix alone does not decide: the first bytes are read too.
    return source == "wikitext2" or (source != "task" and not read.once(("rows", str(path)), lambda: holds_rows(path)))


def _take(parts: Iterable[list[int]], enough: int | None) -> list[int]:
    stream: list[int] = []
    for part in parts:
        stream += part
        if enough is not None and len(stream) >= enough:
            break
    return stream


def _source(
    config: CalibrationConfig, data: DataConfig | None, read: Data, seed: int, generator: random.Random
) -> Iterator[list[int]]:
    """Yield the token ids of a source, row by row."""
    tokenizer = read.tokenizer
    assert tokenizer is not None
    if config.data == "task":
        if data is None:
            raise InputError("calibration data 'task': there is no task; name wikitext2 or a text file instead")
        yield from _rows(read.examples(data, "train", seed), tokenizer, generator)
        return
    if config.data == "wikitext2":
        yield encode_prompt(tokenizer, _wikitext("validation", read))
        return
    path = local_path(config.data)
    if not path.is_file():
        raise InputError(f"calibration data {config.data!r}: is neither 'task' nor 'wikitext2' nor a file here")
    if _is_text(config.data, read):
        yield encode_prompt(tokenizer, read.once(("text", str(path)), lambda: read_text(path)))
        return
    date = None if data is None else data.date
    found = read.once(("text or rows", str(path), date), lambda: _texts_or_rows(path, date, tokenizer))
    if isinstance(found, _Texts):
        for text in generator.sample(found.texts, len(found.texts)):
            if text:
                yield ended(tokenizer, encode_prompt(tokenizer, text))
    else:
        yield from _rows(found, tokenizer, generator)


def _rows(examples: list[Example], tokenizer: PreTrainedTokenizerBase, generator: random.Random) -> Iterator[list[int]]:
    for example in generator.sample(examples, len(examples)):
        prompt, answer = encode(tokenizer, example.prompt, example.answer)
        yield ended(tokenizer, prompt + answer)


@dataclass(frozen=True)
class _Texts:
    """The column `text` of a file of rows."""

    texts: list[str]


def _texts_or_rows(path: Path, date: str | None, tokenizer: PreTrainedTokenizerBase) -> _Texts | list[Example]:
    """Return a file's column `text` if it has one, otherwise its prompts and answers."""
    rows, where = list(read_rows(path)), f"calibration data {path}"
    try:
        plain = bool(rows) and "text" in as_row(rows[0][1])
    except ValueError:
        plain = False  # build_examples names all malformed rows
    if plain:
        return _Texts(read_each(rows, _text, where))
    where = f"data {path}"
    return build_examples(rows, own_builder(None, tokenizer, where, date=date), where)


def _text(row: Row) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise ValueError(f"its text is {type(text).__name__}")
    check_text("text", text)
    return text


def _wikitext(split: Literal["validation", "test"], read: Data) -> str:
    return read.once(("wikitext2", split), lambda: "\n\n".join(_wikitext_rows(split)))


def _wikitext_rows(split: Literal["validation", "test"]) -> list[str]:
    """Return the rows of WikiText-2 as on the Hub: a blank line is empty, all others keep their line end."""
    folder = data_folder()
    local = folder / "wikitext2" / _WIKITEXT_FILES[split] if folder else None
    if local is not None and local.is_file():
        with local.open(encoding="utf-8", newline="\n") as stream:
            return [line if line.strip() else "" for line in stream]
    import datasets

    try:
        return [str(row["text"]) for row in datasets.load_dataset(*_WIKITEXT, split=split)]
    # As in sources.py: the libraries raise unrelated classes for the same cause.
    except Exception as error:
        here = f"the file {local}" if local else f"a local folder ({FOLDER_VARIABLE} is not set)"
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"text wikitext2: no {split} part: looked for {here} and for the Hub data set {_WIKITEXT[0]} ({reason})"
        ) from error
