"""Where the rows of one data set are: a local folder or the Hub.

The user's own rows are files (:mod:`sqft.data.files`). Rows of a built-in task come from `FOLDER/TASK/SPLIT.jsonl`, or
from the Hub if there is no such file. FOLDER is the environment variable SQFT_DATA_DIR, else `../shared/data` relative
to the working directory or the repository. A split that is not found raises an error that lists the searched places.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sqft.data import generated
from sqft.data.files import read_rows, without_absent
from sqft.data.folders import misnamed, split_file
from sqft.data.own import build_examples, own_builder
from sqft.data.tasks import BUILTIN, SPLITS, Example, Row, Split, Task
from sqft.disk import local_path
from sqft.errors import InputError, SplitAbsentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import DataConfig

logger = logging.getLogger(__name__)
Once: TypeAlias = "Callable[[Hashable, Callable[[], list[Example]]], list[Example]]"

FOLDER_VARIABLE = "SQFT_DATA_DIR"
_UNKNOWN_SPLIT = "Unknown split"  # prefix of the error of `datasets` for a split that a data set does not have
# Failed downloads, by (name, configuration, split, revision), with the reason. An attempt without a network takes half
# a minute of retries, and a mix has seven tasks.
_failures: dict[tuple[str, str | None, str, str | None], str] = {}


def data_folder() -> Path | None:
    """Return the local folder of data sets, or None.

    Raises:
        InputError: SQFT_DATA_DIR names something that is not a folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        folder = local_path(named)
        if not folder.is_dir():
            raise InputError(f"{FOLDER_VARIABLE} is {named}, which is not a folder; correct it or unset it")
        return folder
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        candidate = root.parent / "shared" / "data"
        if candidate.is_dir():
            return candidate
    return None


class Reader:
    """Reads the splits of one data set from files or the Hub; `once` caches them."""

    def __init__(self, config: DataConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None, once: Once) -> None:
        self.config = config
        self.task = task
        self.once = once
        # These settings select from the rows; the rows read are the same.
        self.key = repr(config.model_dump(exclude={"train_limit", "validation_rows", "test_rows"}))
        self.where = f"data {config.task}"
        self.build = task.build or own_builder(
            config.template, tokenizer, self.where, date=config.date, chat_template=config.chat_template
        )

    def read(self, split: Split, *, needed: bool) -> list[Example]:
        """Return a split's examples; an empty list if it does not exist and is not needed.

        Raises:
            InputError: it is needed and does not exist, or it is malformed.
        """
        # A cached empty list means an absent split, which is an error if it is needed; an existing split has rows.
        key = ("split", self.key, split)
        return self.once(key, lambda: self._read(split, needed=needed)) or self._read(split, needed=needed)

    def _read(self, split: Split, *, needed: bool) -> list[Example]:
        config, task = self.config, self.task
        if config.task.startswith(generated.PREFIX):
            rows = list(generated.generate(config.task.removeprefix(generated.PREFIX), config.options, split))
            if not rows and not needed:
                return []
            return build_examples(rows, self.build, f"{self.where} ({split}; see options.{split}_size)")
        if task.hub is None:
            return self._read_path(local_path(task.rows or config.task), split, needed=needed)
        if split not in task.splits:
            if needed:
                raise SplitAbsentError(f"{self.where}: has no {split} split{self._remedy(split)}")
            return []
        # By data.task, not the task's name: a task file may have the name of a built-in task.
        folder = data_folder() if config.task in BUILTIN else None
        local = folder / (task.folder or task.name) / f"{task.splits[split]}.jsonl" if folder else None
        if local is not None and local.is_file():
            if config.revision is not None:
                raise InputError(f"data.revision: the rows are those of the file {local}, which has none; remove it")
            return build_examples(read_rows(local), self.build, f"{self.where} ({split})")
        # A split that is only needed as a guard is not downloaded if the data set is local: that could mean a time-out.
        if not needed and local is not None and local.parent.is_dir():
            return self._absent(split)
        return self._read_hub(split, local, needed=needed)

    def refuse_own_test(self) -> None:
        """Check that the data has no test split of its own before `test_rows` makes one.

        Raises:
            InputError: it has one, or the Hub could not be reached.
        """
        config, task = self.config, self.task
        own, remedy = "", ""
        if config.task in BUILTIN:
            own = "as every built-in task"
        elif config.task.startswith(generated.PREFIX):
            size = generated.GymOptions.parse(config.options, self.where).test_size
            own, remedy = f"{size} rows" if size else "", ", or data.options.test_size"
        elif task.hub is None:
            file = split_file(local_path(task.rows or config.task), (task.splits or SPLITS)["test"])
            own, remedy = str(file or ""), ", or take that file away"
        else:
            own = self._own_hub_test(*task.hub)
        if own:
            raise InputError(
                f"{self.where}: data.test_rows is {config.test_rows}, but there is a test split already ({own}); "
                f"set data.test_rows to 0{remedy}"
            )

    def _own_hub_test(self, name: str, configuration: str | None) -> str:
        """Return a description of a Hub data set's test split, or "" if the data set is known to have none."""
        try:
            return f"{len(self._read_hub('test', None, needed=True))} rows on the Hub"
        except SplitAbsentError as error:
            reason = _failures[name, configuration, self._hub_split("test"), self.config.revision]
            if reason.startswith(_UNKNOWN_SPLIT):
                return ""
            raise InputError(
                f"{self.where}: data.test_rows is {self.config.test_rows}, but whether there is a test split already "
                f"could not be seen on the Hub ({reason}); try again, or give the rows as a file"
            ) from error

    def _absent(self, split: str, hint: str = "") -> list[Example]:
        logger.info("%s: no %s split here%s, so no training row is compared with one", self.where, split, hint)
        return []

    def _remedy(self, split: str, reason: str = _UNKNOWN_SPLIT) -> str:
        """Return how to continue without a split; `reason` is the Hub's, which may be temporary."""
        absent = self.config.task not in BUILTIN and reason.startswith(_UNKNOWN_SPLIT)
        cut = split == "validation" or (split == "test" and absent)
        return f"; set data.{split}_rows to cut one from train" if cut else ""

    def _hub_split(self, split: Split) -> str:
        return self.task.hub_splits.get(split, self.task.splits[split])

    def _read_path(self, path: Path, split: Split, *, needed: bool) -> list[Example]:
        named = self.task.splits or SPLITS
        file = path if path.is_file() and split == "train" else split_file(path, named[split])
        if file is not None:
            return build_examples(read_rows(file), self.build, f"{self.where} ({split})")
        hint = misnamed(path, named, split)
        if path.is_dir() and not any(split_file(path, name) for name in named.values()):
            others = "".join(misnamed(path, named, other) for other in named)
            if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
                others = "; datasets.save_to_disk wrote it: write each split with to_parquet('train.parquet') instead"
            raise InputError(
                f"{self.where}: the folder has none of train.jsonl, validation.jsonl, test.jsonl (or .json, .csv, "
                f".parquet){others}"
            )
        if not needed:
            return self._absent(split, hint)
        if path.is_file():
            raise SplitAbsentError(
                f"{self.where}: is one file, so it has no {split} split; "
                f"make it a folder with train.jsonl and {split}.jsonl{self._remedy(split).replace('; set', ', or set')}"
            )
        raise SplitAbsentError(f"{self.where}: has no {named[split]}.jsonl{hint}{self._remedy(split)}")

    def _read_hub(self, split: Split, local: Path | None, *, needed: bool) -> list[Example]:
        task = self.task
        if task.hub is None:
            raise AssertionError("only data sets of the Hub are read from it")
        name, configuration = task.hub
        hub_split, revision = self._hub_split(split), self.config.revision
        import datasets

        rows: list[Row] = []
        wanted = (name, configuration, hub_split, revision)
        if wanted not in _failures:
            try:
                at = {} if revision is None else {"revision": revision}
                rows = list(datasets.load_dataset(name, configuration, split=hub_split, **at))
            # The libraries raise about ten unrelated classes for a missing name, split, file or network.
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
            ((f"row {number}", without_absent(row)) for number, row in enumerate(rows)),
            self.build,
            f"{self.where} ({split})",
        )
