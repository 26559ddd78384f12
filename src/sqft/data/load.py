"""Which rows a stage gets: the splits of its data (:mod:`sqft.data.sources`), and the guards between them.

Guards, the same in every stage because none depends on the run's seed:
- rows of train whose question stands in the test split are removed, and their number is logged; case, punctuation and
  white space do not count (:func:`sqft.data.tasks.normalise`).
- with `validation_rows`, so many rows are cut from train; without, the data's own validation split is used. Either
  loses the questions that stand in test, and train loses those that stand in either: what a search selects on, what a
  table reports and what a model is tuned on are never the same rows.
- with `test_rows`, so many rows are cut from the train of data without a test split of its own, before all others: they
  are its test split in every guard above, and do not change with `validation_rows`.
- `train_limit` draws from what remains; this draw alone depends on the seed.

A mix of tasks (:func:`sqft.data.tasks.mix_members`) has the rows of its members. Its guards hold across them: a
question of one member's test rows is in no member's training rows. A member whose training split is nowhere is left out
of training, which is logged; validation rows come from those members that have such a split or, with `validation_rows`,
are cut from each member's train.

Own data may have no test split, as a single file has none: then nothing is reported and nothing guarded, unless
`test_rows` cuts one. Data that has one is refused with `test_rows`: two readings of "test" are one too many.
"""

from __future__ import annotations

import difflib
import logging
import random
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqft.data import generated
from sqft.data.chat import as_chat
from sqft.data.files import local_path, read_rows, split_name
from sqft.data.guards import cut, drop, questions
from sqft.data.own import build_examples, own_builder
from sqft.data.sources import Reader
from sqft.data.taskfile import is_task_file, load_task_file
from sqft.data.tasks import BUILTIN, MIXES, SPLITS, Example, Metric, Split, Task, mix_members
from sqft.errors import InputError, SplitAbsentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import DataConfig, Template

logger = logging.getLogger(__name__)

T = TypeVar("T")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_task(config: DataConfig) -> Task:
    """Return the task that `config.task` names.

    Raises:
        InputError: it names no task, file or data set, or has settings that this kind of data does not take.
    """
    name = config.task
    if mix_members(name):
        raise InputError(f"data.task {name} is a mix; name one of its tasks: {', '.join(mix_members(name))}")
    if name in BUILTIN:
        if config.template is not None:
            raise InputError(f"data.template: the task {name} is built in and has its own wording; remove the template")
        task = BUILTIN[name]
    elif name.startswith(generated.PREFIX):
        choices = generated.GymOptions.parse(config.options, f"data.options of {name}").choices
        metric: Metric = "choice" if choices else "exact"
        task = Task(name, metric, generated.builder(choices), SPLITS, fold_punctuation=False)
    elif is_task_file(name):
        if config.template is not None:
            raise InputError(f"data.template: the task file {name} has its own wording; remove the template")
        task = load_task_file(local_path(name))
    elif local_path(name).exists():
        plain, ending = split_name(name)
        task = Task(Path(plain).name if ending else Path(name).stem, "exact")
    elif _HUB_NAME.fullmatch(name) and not name.startswith((".", "~")) and not split_name(name)[1]:
        task = Task(name, "exact", splits=SPLITS, hub=(name, None))
    else:
        near = difflib.get_close_matches(name, (*BUILTIN, *MIXES), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"data.task {name!r}: {hint}it is neither a file or folder here, nor a Hub data set 'owner/name', nor "
            f"'gym:NAME', nor built in ({', '.join((*BUILTIN, *MIXES))})"
        )
    if config.revision is not None and task.hub is None:
        raise InputError(f"data.revision: only data sets of the Hub have revisions, and {name} is none; remove it")
    if config.options and not name.startswith(generated.PREFIX):
        raise InputError(f"data.options: only 'gym:NAME' tasks have options, and {name} is none; remove them")
    return task


class Data:
    """The rows of a run; every file is read once, and every split guarded once, however many stages use it.

    Kept are the examples, which training and evaluation hold anyway; the rows that they were built from are not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Take the tokenizer that chat rows need."""
        self.tokenizer = tokenizer
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what `read` returned when it was first called with this key."""
        if key not in self._kept:
            self._kept[key] = read()
        found: T = self._kept[key]
        return found

    def task(self, config: DataConfig) -> Task:
        """Return :func:`resolve_task`."""
        return self.once(("task", repr(config)), lambda: resolve_task(config))

    def examples(self, config: DataConfig, split: Split, seed: int) -> list[Example]:
        """Return the examples of a split, guarded against the other splits.

        Args:
            config: the recipe's data.
            split: train, validation or test.
            seed: chooses the rows of `train_limit`, nothing else.

        Raises:
            InputError: the split is nowhere, empty, malformed, or smaller than the rows to be cut from it.
        """
        rows = [example for _, part in self.tasks(config, split) for example in part]
        if split == "train" and config.train_limit is not None and config.train_limit < len(rows):
            kept = random.Random(seed).sample(range(len(rows)), config.train_limit)  # noqa: S311
            rows = [rows[index] for index in sorted(kept)]
        logger.debug("%s: %d %s rows", config.task, len(rows), split)
        return rows

    def tasks(self, config: DataConfig, split: Split) -> list[tuple[Task, list[Example]]]:
        """Return all guarded examples of a split by task: of a mix its members that have the split, else the one task.

        Raises:
            InputError: as for :meth:`examples`.
        """
        return self.once(("tasks", split, repr(config)), lambda: self._tasks(config, split))

    def _tasks(self, config: DataConfig, split: Split) -> list[tuple[Task, list[Example]]]:
        members = member_configs(config)
        tasks = {member.task: self.task(member) for member in members}
        parts = {
            member.task: _read_splits(
                Reader(member, tasks[member.task], self.tokenizer, self.once),
                split,
                optional=len(members) > 1 and split != "test",
            )
            for member in members
        }
        guarded = {"test": (), "validation": ("test",), "train": ("test", "validation")}[split]
        found = []
        for name, task in tasks.items():
            rows = parts[name][split]
            for other in guarded:
                seen = {q for n, part in parts.items() for q in questions(tasks[n], part.get(cast("Split", other), []))}
                rows = drop(task, rows, seen, split, other) if rows else rows
            if config.chat_template:
                rows = [as_chat(row, self.tokenizer, task, config.date) for row in rows]
            if rows:
                found.append((task, rows))
        if not found:
            raise InputError(f"data {config.task}: none of its tasks has a {split} split here")
        return found

    def file(
        self, path: Path, template: Template | None, *, date: str | None = None, chat_template: bool = False
    ) -> list[Example]:
        """Return all rows of one file of the user's own; the arguments are those of own_builder."""
        where = f"data {path}"
        build = own_builder(template, self.tokenizer, where, date=date, chat_template=chat_template)
        key = ("file", str(path), template, date, chat_template)
        return self.once(key, lambda: build_examples(read_rows(path), build, where))

    def folds_punctuation(self, config: DataConfig) -> bool:
        """Return whether punctuation is ignored where questions of this data are compared with those of other data."""
        return all(self.task(member).fold_punctuation for member in member_configs(config))


def load_examples(
    config: DataConfig, split: Split, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Example]:
    """Return :meth:`Data.examples` of data that is read for this alone."""
    return Data(tokenizer).examples(config, split, seed)


def load_tasks(
    config: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[Task, list[Example]]]:
    """Return :meth:`Data.tasks` of data that is read for this alone."""
    return Data(tokenizer).tasks(config, split)


def member_configs(config: DataConfig) -> list[DataConfig]:
    """Return the data of each task of a mix; of a single task its own."""
    names = mix_members(config.task)
    if not names:
        return [config]
    if config.template is not None or config.options or config.revision is not None:
        raise InputError(
            f"data.task {config.task} is a mix of built-in tasks, which take no template and no options, and several "
            "data sets have no one revision"
        )
    return [config.model_copy(update={"task": name}) for name in names]


def _read_splits(reader: Reader, split: Split, *, optional: bool) -> dict[Split, list[Example]]:
    """Return the wanted split and those that guard it, as their source has them; test and validation cut if asked for.

    With `optional` a split that is nowhere is empty, and those that guard other members' rows are there all the same.
    """
    config, task = reader.config, reader.task

    def wanted(split: Split) -> list[Example]:
        try:
            return reader.read(split, needed=True)
        except SplitAbsentError as error:
            if not optional:
                raise
            logger.info("leaves %s out of the %s rows of the mix: %s", task.name, split, error)
            return []

    rest: list[Example] | None = None
    if config.test_rows:
        reader.refuse_own_test()
        test, rest = cut(task, reader.read("train", needed=True), "test_rows", config.test_rows)
    else:
        test = reader.read("test", needed=split == "test")
    if split == "test":
        return {"test": test}
    if split == "validation" and not config.validation_rows:
        return {"test": test, "validation": wanted("validation")}
    pool = wanted("train") if rest is None else rest
    if pool:
        pool = drop(task, pool, questions(task, test), "train", "test")
    if config.validation_rows and pool:
        left = " that test_rows leaves" if config.test_rows else ""
        validation, pool = cut(task, pool, "validation_rows", config.validation_rows, left)
    else:
        validation = reader.read("validation", needed=False)
    return {"test": test, "validation": validation, "train": pool}
