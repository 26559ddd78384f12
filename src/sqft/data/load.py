"""Which rows a stage gets: local folder or Hub, splits, and the guards between them.

Places. Rows of a built-in task come from `FOLDER/TASK/SPLIT.jsonl`, where FOLDER is the environment's SQFT_DATA_DIR,
else `../shared/data` beside the working directory or beside the repository, and from the Hub where there is no such
file. A split that is nowhere is an error that says in one line what was looked for.

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
import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqft.data import generated
from sqft.data.guards import cut, drop, questions
from sqft.data.own import as_chat, build_examples, own_builder, read_lines
from sqft.data.taskfile import is_task_file, load_task_file
from sqft.data.tasks import BUILTIN, MIXES, Example, Metric, Row, Split, Task, mix_members
from sqft.errors import InputError, SplitAbsentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import DataConfig, Template

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SQFT_DATA_DIR"
_UNKNOWN_SPLIT = "Unknown split"  # how `datasets` begins to say that a data set has no such split
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What the Hub did not have, by (name, configuration, split), and why. A try without a network takes half a minute of
# retries, a mix has seven tasks, and each stage of a run reads them anew.
_failures: dict[tuple[str, str | None, str], str] = {}
_SPLITS: dict[Split, str] = {"train": "train", "validation": "validation", "test": "test"}


def data_folder() -> Path | None:
    """Return the local folder of data sets, None if there is none.

    Raises:
        InputError: SQFT_DATA_DIR names something that is not a folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise InputError(f"{FOLDER_VARIABLE} is {named}, which is not a folder; correct it or unset it")
        return Path(named)
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        candidate = root.parent / "shared" / "data"
        if candidate.is_dir():
            return candidate
    return None


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
        return Task(name, metric, generated.builder(choices), _SPLITS, fold_punctuation=False)
    elif is_task_file(name):
        if config.template is not None:
            raise InputError(f"data.template: the task file {name} has its own wording; remove the template")
        task = load_task_file(Path(name).expanduser())
    elif Path(name).expanduser().exists():
        task = Task(Path(name).stem, "exact")
    elif _HUB_NAME.fullmatch(name) and not name.startswith(".") and not name.endswith((".jsonl", ".json")):
        task = Task(name, "exact", splits=_SPLITS, hub=(name, None))
    else:
        near = difflib.get_close_matches(name, (*BUILTIN, *MIXES), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"data.task {name!r}: {hint}it is neither a file or folder here, nor a Hub data set 'owner/name', nor "
            f"'gym:NAME', nor built in ({', '.join((*BUILTIN, *MIXES))})"
        )
    if config.options:
        raise InputError(f"data.options: only 'gym:NAME' tasks have options, and {name} is none; remove them")
    return task


def load_examples(
    config: DataConfig, split: Split, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Example]:
    """Return the examples of a split, guarded against the other splits.

    Args:
        config: the recipe's data.
        split: train, validation or test.
        seed: chooses the rows of `train_limit`, nothing else.
        tokenizer: needed for chat rows.

    Raises:
        InputError: the split is nowhere, empty, malformed, or smaller than the rows to be cut from it.
    """
    rows = [example for _, part in load_tasks(config, split, tokenizer) for example in part]
    if split == "train" and config.train_limit is not None and config.train_limit < len(rows):
        kept = random.Random(seed).sample(range(len(rows)), config.train_limit)  # noqa: S311
        rows = [rows[index] for index in sorted(kept)]
    logger.debug("%s: %d %s rows", config.task, len(rows), split)
    return rows


def load_tasks(
    config: DataConfig, split: Split, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[Task, list[Example]]]:
    """Return all guarded examples of a split by task: of a mix its members that have the split, else the one task.

    Raises:
        InputError: as for :func:`load_examples`.
    """
    members = member_configs(config)
    tasks = {member.task: resolve_task(member) for member in members}
    parts = {
        member.task: _read_splits(
            member, tasks[member.task], split, tokenizer, optional=len(members) > 1 and split != "test"
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
        if rows:
            found.append((task, [as_chat(row, tokenizer, task) for row in rows] if config.chat_template else rows))
    if not found:
        raise InputError(f"data {config.task}: none of its tasks has a {split} split here")
    return found


def member_configs(config: DataConfig) -> list[DataConfig]:
    """Return the data of each task of a mix; of a single task its own."""
    names = mix_members(config.task)
    if not names:
        return [config]
    if config.template is not None or config.options:
        raise InputError(f"data.task {config.task} is a mix of built-in tasks, which take no template and no options")
    return [config.model_copy(update={"task": name}) for name in names]


def _read_splits(
    config: DataConfig, task: Task, split: Split, tokenizer: PreTrainedTokenizerBase | None, *, optional: bool
) -> dict[Split, list[Example]]:
    """Return the wanted split and those that guard it, as their source has them; test and validation cut if asked for.

    With `optional` a split that is nowhere is empty, and those that guard other members' rows are there all the same.
    """
    reader = _Reader(config, task, tokenizer)

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


def load_file(path: Path, template: Template | None, tokenizer: PreTrainedTokenizerBase | None) -> list[Example]:
    """Return all rows of one JSONL file of the user's own."""
    where = f"data {path}"
    return build_examples(read_lines(path), own_builder(template, tokenizer, where), where)


def folds_punctuation(config: DataConfig) -> bool:
    """Tell whether punctuation is ignored where questions of this data are compared with those of other data."""
    return all(resolve_task(member).fold_punctuation for member in member_configs(config))


class _Reader:
    """Reads the splits of one data set, wherever they are."""

    def __init__(self, config: DataConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.config = config
        self.task = task
        self.where = f"data {config.task}"
        self.build = task.build or own_builder(
            config.template, tokenizer, self.where, chat_template=config.chat_template
        )

    def read(self, split: Split, *, needed: bool) -> list[Example]:
        """Return a split's examples; an empty list if it does not exist and is not needed.

        Raises:
            InputError: it is needed and nowhere, or it is malformed.
        """
        config, task = self.config, self.task
        if config.task.startswith(generated.PREFIX):
            rows = list(generated.generate(config.task.removeprefix(generated.PREFIX), config.options, split))
            if not rows and not needed:
                return []
            return build_examples(rows, self.build, f"{self.where} ({split}; see options.{split}_size)")
        if task.hub is None:
            return self._read_path(Path(task.rows or config.task).expanduser(), split, needed=needed)
        if split not in task.splits:
            if needed:
                raise SplitAbsentError(f"{self.where}: has no {split} split{self._remedy(split)}")
            return []
        # By what data.task names: a task file may be called as a built-in task is.
        folder = data_folder() if config.task in BUILTIN else None
        local = folder / (task.folder or task.name) / f"{task.splits[split]}.jsonl" if folder else None
        if local is not None and local.is_file():
            return build_examples(read_lines(local), self.build, f"{self.where} ({split})")
        # Guards alone never go to the network for a data set that is here: a missing file is not worth a time-out.
        if not needed and local is not None and local.parent.is_dir():
            return self._absent(split)
        return self._read_hub(split, local, needed=needed)

    def refuse_own_test(self) -> None:
        """Refuse to cut test rows from data that has a test split of its own, or of which that cannot be known.

        Raises:
            InputError: as said.
        """
        config, task = self.config, self.task
        own, remedy = "", ""
        if config.task in BUILTIN:
            own = "as every built-in task"
        elif config.task.startswith(generated.PREFIX):
            size = generated.GymOptions.parse(config.options, self.where).test_size
            own, remedy = f"{size} rows" if size else "", ", or data.options.test_size"
        elif task.hub is None:
            file = self._file(Path(task.rows or config.task).expanduser(), "test")
            own, remedy = str(file) if file.is_file() else "", ", or take that file away"
        else:
            own = self._own_hub_test(*task.hub)
        if own:
            raise InputError(
                f"{self.where}: data.test_rows is {config.test_rows}, but there is a test split already ({own}); "
                f"set data.test_rows to 0{remedy}"
            )

    def _own_hub_test(self, name: str, configuration: str | None) -> str:
        """Describe the test split of a Hub data set, or return nothing where the data set is known to have none."""
        try:
            return f"{len(self._read_hub('test', None, needed=True))} rows on the Hub"
        except SplitAbsentError as error:
            reason = _failures[name, configuration, self._hub_split("test")]
            if reason.startswith(_UNKNOWN_SPLIT):
                return ""
            raise InputError(
                f"{self.where}: data.test_rows is {self.config.test_rows}, but whether there is a test split already "
                f"could not be seen on the Hub ({reason}); try again, or give the rows as a file"
            ) from error

    def _absent(self, split: str) -> list[Example]:
        logger.info("%s: no %s split here, so no training row is compared with one", self.where, split)
        return []

    def _remedy(self, split: str, reason: str = _UNKNOWN_SPLIT) -> str:
        """Return how to do without a split; `reason` is why the Hub did not give it, which may be for now only."""
        absent = self.config.task not in BUILTIN and reason.startswith(_UNKNOWN_SPLIT)
        cut = split == "validation" or (split == "test" and absent)
        return f"; set data.{split}_rows to cut one from train" if cut else ""

    def _file(self, path: Path, split: Split) -> Path:
        """Return where a split of local rows stands, there or not."""
        named = self.task.splits or _SPLITS
        return path if path.is_file() and split == "train" else path / f"{named[split]}.jsonl"

    def _hub_split(self, split: Split) -> str:
        return self.task.hub_splits.get(split, self.task.splits[split])

    def _read_path(self, path: Path, split: Split, *, needed: bool) -> list[Example]:
        named = self.task.splits or _SPLITS
        file = self._file(path, split)
        if path.is_dir() and not any((path / f"{name}.jsonl").is_file() for name in named.values()):
            raise InputError(f"{self.where}: the folder has none of train.jsonl, validation.jsonl, test.jsonl")
        if file.is_file():
            return build_examples(read_lines(file), self.build, f"{self.where} ({split})")
        if not needed:
            return self._absent(split)
        if path.is_file():
            raise SplitAbsentError(
                f"{self.where}: is one file, so it has no {split} split; "
                f"make it a folder with train.jsonl and {split}.jsonl{self._remedy(split).replace('; set', ', or set')}"
            )
        raise SplitAbsentError(f"{self.where}: has no {split}.jsonl{self._remedy(split)}")

    def _read_hub(self, split: Split, local: Path | None, *, needed: bool) -> list[Example]:
        task = self.task
        if task.hub is None:
            raise AssertionError("only data sets of the Hub are read from it")
        name, configuration = task.hub
        hub_split = self._hub_split(split)
        import datasets

        rows: list[Row] = []
        wanted = (name, configuration, hub_split)
        if wanted not in _failures:
            try:
                rows = list(datasets.load_dataset(name, configuration, split=hub_split))
            # The libraries below raise some ten unrelated classes for a missing name, split, file or network.
            except Exception as error:
                _failures[wanted] = (str(error).splitlines() or [""])[0] or type(error).__name__
        if wanted in _failures:
            if not needed:
                return self._absent(split)
            here = f"the file {local}" if local else f"a local folder ({FOLDER_VARIABLE} is not set)"
            if self.config.task not in BUILTIN:
                here = f"a file or folder {name}"
            raise SplitAbsentError(
                f"{self.where}: no {split} split: looked for {here} and for the Hub data set {name}"
                f"{f' ({configuration})' if configuration else ''}, split {hub_split!r} ({_failures[wanted]})"
                f"{self._remedy(split, _failures[wanted])}"
            )
        logger.info("%s: %s split from the Hub data set %s, %d rows", self.where, split, name, len(rows))
        return build_examples(
            ((f"row {number}", row) for number, row in enumerate(rows)), self.build, f"{self.where} ({split})"
        )
