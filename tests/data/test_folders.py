"""Folders of rows: one file a split, whatever its kind; a misnamed file is not overlooked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sqft.data.load import load_examples
from sqft.errors import InputError
from sqft.recipe import DataConfig

LINE = json.dumps({"prompt": "{}", "completion": " a"})


def folder(tmp_path: Path, *names: str) -> DataConfig:
    for name in names:
        line = LINE.replace("{}", name)
        (tmp_path / name).write_text(f"prompt,completion\n{name}, a\n" if name.endswith(".csv") else line)
    return DataConfig(task=str(tmp_path))


def test_splits_may_be_files_of_different_kinds(tmp_path: Path) -> None:
    config = folder(tmp_path, "train.jsonl", "validation.csv", "test.json", "notes.md", "old.train.jsonl")
    for split, name in (("train", "train.jsonl"), ("validation", "validation.csv"), ("test", "test.json")):
        assert [example.prompt for example in load_examples(config, split, 0)] == [name]  # type: ignore[arg-type]


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    config = folder(tmp_path, "train.jsonl", "train.csv")
    with pytest.raises(InputError, match=r"has 2 files for one split, train.csv, train.jsonl; keep one of them"):
        load_examples(config, "train", 0)


@pytest.mark.parametrize("name", ["val.jsonl", "dev.jsonl", "valid.csv", "my_dev_set.jsonl", "Validation.jsonl",
                                  "validaton.jsonl", "eval.json"])  # fmt: skip
def test_a_misnamed_validation_file_is_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = folder(tmp_path, "train.jsonl", "test.jsonl", name)
    ending = name.rpartition(".")[2]
    hint = rf"\({name} would be validation.{ending}: rename it\)"
    with pytest.raises(InputError, match=rf"has no validation.jsonl {hint}; set data.validation_rows"):
        load_examples(config, "validation", 0)
    # Training needs no validation rows, and says that it does not look at these.
    with caplog.at_level(logging.INFO, "sqft"):
        load_examples(config, "train", 0)
    assert f"no validation split here ({name} would be validation.{ending}: rename it)" in caplog.text


def test_a_folder_without_any_split_says_what_its_files_may_be(tmp_path: Path) -> None:
    config = folder(tmp_path, "training.jsonl", "tests.csv", "train-00000-of-00002.json", "train-00001-of-00002.json")
    with pytest.raises(InputError) as raised:
        load_examples(config, "train", 0)
    text = str(raised.value)
    assert "none of train.jsonl, validation.jsonl, test.jsonl (or .json, .csv, .parquet)" in text
    assert "(3 files may be meant, train-00000-of-00002.json to training.jsonl: make one train of them)" in text
    assert "(tests.csv would be test.csv: rename it)" in text
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match=r"datasets.save_to_disk wrote it: write each split with to_parquet"):
        load_examples(config, "train", 0)


def test_names_of_a_task_files_splits(tmp_path: Path) -> None:
    folder(tmp_path, "train.jsonl", "dev.jsonl")
    task = tmp_path / "task.yaml"
    text = "name: t\ndata: .\nmetric: exact\nprompt: '{prompt}'\nanswer: '{completion}'\n"
    task.write_text(text + "splits: {validation: dev}\n")
    assert load_examples(DataConfig(task=str(task)), "validation", 0)[0].prompt == "dev.jsonl"
    task.write_text(text + "splits: {validation: heldout}\n")
    with pytest.raises(InputError, match=r"has no heldout.jsonl \(dev.jsonl would be heldout.jsonl: rename it\)"):
        load_examples(DataConfig(task=str(task)), "validation", 0)
