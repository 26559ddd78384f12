"""Overlap between splits: rows with the same question are dropped, and splits are cut from train.

Both depend on the rows alone, so all stages and seeds agree. A cut draws rows, not questions: if a question occurs
several times and one copy is drawn, :func:`drop` removes the other copies from the rest.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

from sqft.data.tasks import Example, Task, question_key
from sqft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

_SEED = 42


def questions(task: Task, examples: Sequence[Example]) -> set[str]:
    """Return the questions of some rows, normalised for comparison."""
    return {question_key(example, punctuation=task.fold_punctuation) for example in examples}


def drop(task: Task, examples: list[Example], seen: set[str], split: str, other: str) -> list[Example]:
    """Remove the examples whose question stands in another split.

    Raises:
        InputError: none is left.
    """
    kept = [e for e in examples if question_key(e, punctuation=task.fold_punctuation) not in seen]
    if len(kept) < len(examples):
        logger.info(
            "%s: removed %d of %d %s rows whose question stands in %s",
            task.name,
            len(examples) - len(kept),
            len(examples),
            split,
            other,
        )
    if not kept:
        raise InputError(f"data {task.name}: every question of its {split} rows also stands in {other}; none is left")
    return kept


def cut(
    task: Task, pool: list[Example], setting: str, rows: int, left: str = ""
) -> tuple[list[Example], list[Example]]:
    """Cut a split from the training rows, the same one in every stage and for every seed.

    Args:
        task: names the rows in messages.
        pool: the training rows.
        setting: the setting of `data` that asks for the split.
        rows: its size.
        left: says in the message what was cut before.

    Returns:
        The rows of the split and those that remain, both in the order of `pool`.

    Raises:
        InputError: nothing would remain.
    """
    if rows >= len(pool):
        raise InputError(f"data.{setting} is {rows}, but {task.name} has {len(pool)} training rows{left}; choose fewer")
    taken = set(random.Random(_SEED).sample(range(len(pool)), rows))  # noqa: S311
    return [e for i, e in enumerate(pool) if i in taken], [e for i, e in enumerate(pool) if i not in taken]
