"""Tasks that reasoning-gym generates from a seed: data with no download and no licence question.

`data.task: gym:NAME` with `data.options` {train_size, validation_size, test_size, seed, choices, config}; `config`
holds the generator's own settings. With `choices`, the list of all possible answers, the likeliest of them is judged
(metric acc) instead of the exact answer. The three splits come from disjoint ranges of seeds, because most generators
draw row i from seed + i: neighbouring seeds share all rows but one. The seed is an option of the data and not the
run's: two runs that differ in their seed are judged on the same rows. A question of small numbers can be drawn twice
whatever the seeds, so the loader removes from train what stands in the other splits; that comparison keeps punctuation,
because `5 - 3` is not `5 + 3`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqft.data.tasks import Example, Row, Split
from sqft.errors import InputError, Problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PREFIX = "gym:"
SPAN = 10_000_000  # seeds of a split; more rows than this would run into the next split's
_ORDER: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class GymOptions:
    """The settings of a generated task; sizes in rows."""

    train_size: int = 2000
    validation_size: int = 200
    test_size: int = 500
    seed: int = 0
    choices: Sequence[str] = ()
    config: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> GymOptions:
        """Check the options of a recipe.

        Raises:
            InputError: unknown options and wrong values, all of them.
        """
        known = list(cls.__dataclass_fields__)
        with Problems(where) as problems:
            for name, value in values.items():
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                    problems.add(f"unknown option {name!r}; {hint}; the generator's own settings stand in 'config'")
                elif name == "config":
                    if not isinstance(value, dict):
                        problems.add(f"config is {type(value).__name__}, not a mapping of the generator's settings")
                elif name == "choices":
                    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
                        problems.add(f"choices is {value!r}; give the list of all answers, at least two texts")
                elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= SPAN:
                    problems.add(f"{name} is {value!r}; choose a whole number from 0 to {SPAN:,}")
        return cls(**values)


def generate(name: str, options: Mapping[str, Any], split: Split) -> Iterator[tuple[str, Row]]:
    """Yield place and content of a split's rows.

    Args:
        name: a reasoning-gym data set.
        options: `data.options` of the recipe.
        split: which rows.

    Raises:
        InputError: reasoning-gym is not installed, has no such data set, or refuses its settings.
    """
    where = f"data {PREFIX}{name}"
    settings = GymOptions.parse(options, where)
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(f"{where}: needs reasoning-gym: pip install reasoning-gym==0.1.25") from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see the list of reasoning-gym"
        raise InputError(f"{where}: reasoning-gym has no data set {name!r}; {hint}")
    size = {"train": settings.train_size, "validation": settings.validation_size, "test": settings.test_size}[split]
    if size == 0:
        return
    seed = (3 * settings.seed + _ORDER.index(split)) * SPAN
    try:
        rows = reasoning_gym.create_dataset(name, size=size, seed=seed, **(settings.config or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{where}: its options.config is refused ({error})") from error
    for number, row in enumerate(rows):
        yield f"{where}, {split} row {number}", row


def builder(choices: Sequence[str]) -> Callable[[Row], Example]:
    """Return what turns a generated row into an example, of a `choice` task when there are choices."""
    answers = tuple(f" {choice}" for choice in choices)

    def build(row: Row) -> Example:
        if not isinstance(row["answer"], str):
            raise ValueError("has no single answer, so exact match cannot judge it; choose another generator")
        example = Example(f"Question: {row['question']}\nAnswer:", f" {row['answer']}", question=row["question"])
        if not answers:
            return example
        if example.answer not in answers:
            raise ValueError(f"its answer {row['answer']!r} is not among data.options.choices")
        return replace(example, choices=answers, gold=answers.index(example.answer))

    return build
