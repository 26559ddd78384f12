"""Which rows a stage gets: the splits of its data (:mod:`sqft.data.sources`), and the guards between them.

Guards against overlap, the same in every stage because they do not depend on the run's seed:
- training rows whose question is in the test split are removed, and their number is logged. The comparison ignores
  case, punctuation and white space (:func:`sqft.data.tasks.normalise`).
- `validation_rows` splits that many rows off train; without it the data's own validation split is used. Questions of
  the test split are removed from both validation and train, and validation questions from train. So rows used for
  training, for search and for reporting are disjoint.
- `test_rows` splits that many rows off train, if the data has no test split. It is applied first, so these rows do not
  change with `validation_rows`. The guards above treat them as the test split.
- `train_limit` samples from the remaining rows. Only this sample depends on the seed.

A mix of tasks (:func:`sqft.data.tasks.mix_members`) has the rows of its members. The guards apply across members: a
test question of one member is in no member's training rows. A member without a training split is left out of training,
with a log message. Validation rows come from the members that have a validation split or, with `validation_rows`, from
each member's train.

The user's own data may have no test split (a single file): then nothing is reported and there is no guard, unless
`test_rows` is set. `test_rows` raises an error if the data has a test split: the name "test" would be ambiguous.
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
from sqft.data.files import read_rows, split_name
from sqft.data.guards import cut, drop, questions
from sqft.data.own import build_examples, own_builder
from sqft.data.sources import Reader
from sqft.data.taskfile import is_task_file, load_task_file
from sqft.data.tasks import BUILTIN, MIXES, SPLITS, Example, Metric, Split, Task, mix_members
from sqft.disk import local_path
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
    """The rows of a run: each file is read once and each split guarded once, for all stages.

    It caches examples, which training and evaluation keep in memory anyway, and not the rows they are built from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Set the tokenizer, which chat rows need."""
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
            InputError: the split does not exist, is empty or malformed, or has fewer rows than are split off from it.
        """
        rows = [example for _, part in self.tasks(config, split) for example in part]
        if split == "train" and config.train_limit is not None and config.train_limit < len(rows):
            kept = random.Random(seed).sample(range(len(rows)), config.train_limit)  # noqa: S311
            rows = [rows[index] for index in sorted(kept)]
        logger.debug("%s: %d %s rows", config.task, len(rows), split)
        return rows

    def tasks(self, config: DataConfig, split: Split) -> list[tuple[Task, list[Example]]]:
        """Return all guarded examples of a split by task; for a mix, those of the members that have the split.

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
        """Return all examples of one of the user's files; the arguments are those of own_builder."""
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
    """Return :meth:`Data.examples`, with a cache of its own."""
    return Data(tokenizer).examples(config, split, seed)


def load_tasks(
    config: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[Task, list[Example]]]:
    """Return :meth:`Data.tasks`, with a cache of its own."""
    return Data(tokenizer).tasks(config, split)


def member_configs(config: DataConfig) -> list[DataConfig]:
    """Return the data settings of each member of a mix, or the given ones for a single task."""
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
    """Return a split and those that guard it; test and validation are split off train if the settings say so.

    With `optional` a split that does not exist is empty; the splits that guard other members' rows are still returned.
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
