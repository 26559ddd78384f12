"""Splits that are cut from the training rows: apart, the same every time, and refused where they make no sense."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.artifact import describe, key_of
from sqft.data.load import load_examples, load_tasks
from sqft.data.tasks import Example, Split
from sqft.errors import InputError
from sqft.recipe import DataConfig, Recipe, parse_config

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write(path: Path, prompts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p, "completion": f" {p[-1]}"}) + "\n" for p in prompts))
    return path


def prompts(examples: list[Example]) -> list[str]:
    return [example.prompt for example in examples]


def parts(config: DataConfig, seed: int = 0) -> dict[Split, list[str]]:
    return {split: prompts(load_examples(config, split, seed)) for split in SPLITS}


@pytest.fixture
def numbers(tmp_path: Path) -> DataConfig:
    """One file of forty questions."""
    return DataConfig(task=str(write(tmp_path / "rows.jsonl", [f"row {i}" for i in range(40)])), test_rows=8)


def test_one_file_gives_three_splits_that_share_no_row(numbers: DataConfig) -> None:
    found = parts(numbers.model_copy(update={"validation_rows": 5}))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 27, "validation": 5, "test": 8}
    assert sorted(row for rows in found.values() for row in rows) == sorted(f"row {i}" for i in range(40))
    # In the file's order, and not its head or tail.
    order = [int(row.split()[1]) for row in found["test"]]
    assert order == sorted(order)
    assert order not in (list(range(8)), list(range(32, 40)))


def test_the_cut_is_the_same_for_every_seed_and_release(numbers: DataConfig) -> None:
    test = prompts(load_examples(numbers, "test", 0))
    # Written down when it was made: another draw would make old and new tables incomparable.
    assert test == [f"row {i}" for i in (1, 5, 6, 7, 8, 14, 15, 17)]
    assert all(prompts(load_examples(numbers, "test", seed)) == test for seed in (1, 7, 2**31))
    for change in ({"validation_rows": 5}, {"train_limit": 3}):
        assert prompts(load_examples(numbers.model_copy(update=change), "test", 0)) == test
    assert [task.name for task, _ in load_tasks(numbers, "test")] == ["rows"]


def test_a_question_that_stands_twice_is_on_one_side_alone(tmp_path: Path) -> None:
    rows = [wording for i in range(20) for wording in (f"What is {i}?", f"what is  {i}", f"WHAT IS {i} !")]
    config = DataConfig(task=str(write(tmp_path / "rows.jsonl", rows)), test_rows=10, validation_rows=6)
    found = parts(config)
    asked = {split: {"".join(filter(str.isdigit, row)) for row in part} for split, part in found.items()}
    assert not asked["test"] & asked["validation"]
    assert not asked["test"] & asked["train"]
    assert not asked["validation"] & asked["train"]
    assert asked["train"]
    # No row is made up, and what is missing asks what another split asks.
    used = Counter(row for part in found.values() for row in part)
    assert all(used[row] <= count for row, count in Counter(rows).items())
    missing = {"".join(filter(str.isdigit, row)) for row in Counter(rows) - used}
    assert missing <= asked["test"] | asked["validation"]


def test_a_validation_file_beside_loses_what_test_asks(tmp_path: Path) -> None:
    write(tmp_path / "own" / "train.jsonl", [f"row {i}" for i in range(12)])
    write(tmp_path / "own" / "validation.jsonl", [f"Row {i}." for i in range(0, 24)])
    config = DataConfig(task=str(tmp_path / "own"), test_rows=4)
    test = load_examples(config, "test", 0)
    validation = prompts(load_examples(config, "validation", 0))
    assert validation == [f"Row {i}." for i in range(24) if f"row {i}" not in prompts(test)]
    with pytest.raises(InputError, match="every question of its train rows also stands in validation"):
        load_examples(config, "train", 0)


def test_a_task_file_may_name_one_file(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [f"row {i}" for i in range(10)])
    task = tmp_path / "task.yaml"
    task.write_text(
        'name: rows\ndata: rows.jsonl\nmetric: choice\nprompt: "{prompt}"\ngold: completion\n'
        f"choices: {json.dumps([f' {i}' for i in range(10)])}\n"
    )
    config = DataConfig(task=str(task), test_rows=3)
    assert [len(rows) for rows in parts(config.model_copy(update={"validation_rows": 2})).values()] == [5, 2, 3]
    ((found, examples),) = load_tasks(config, "test")
    assert found.metric == "choice"
    assert all(example.choices[example.gold or 0] == example.answer for example in examples)


def test_a_generated_task_without_test_rows_of_its_own() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    options = {"train_size": 30, "validation_size": 0, "test_size": 0, "config": {"min_terms": 4, "max_terms": 5}}
    config = DataConfig(task="gym:chain_sum", options=options, test_rows=6, validation_rows=4)
    found = parts(config)
    assert [len(rows) for rows in found.values()] == [20, 4, 6]
    assert len({row for rows in found.values() for row in rows}) == 30
    with pytest.raises(
        InputError,
        match=r"data gym:chain_sum: data.test_rows is 6, but there is a test split already \(500 rows\); "
        r"set data.test_rows to 0, or data.options.test_size",
    ):
        load_examples(config.model_copy(update={"options": {"train_size": 30}}), "train", 0)


@pytest.mark.parametrize("split", SPLITS)
def test_data_with_a_test_split_is_refused(split: Split, tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / "own" / f"{name}.jsonl", [f"{name} {i}" for i in range(9)])
    config = DataConfig(task=str(tmp_path / "own"), test_rows=3, validation_rows=2)
    with pytest.raises(
        InputError,
        match=r"data .*own: data.test_rows is 3, but there is a test split already \(.*own/test.jsonl\); "
        r"set data.test_rows to 0, or take that file away",
    ):
        load_examples(config, split, 0)
    for task, name in (("gsm8k", "gsm8k"), ("boolq+arc_easy", "boolq")):
        with pytest.raises(
            InputError, match=rf"data {name}: .* already \(as every built-in task\); set data.test_rows"
        ):
            load_examples(config.model_copy(update={"task": task}), split, 0)


def test_a_cut_that_leaves_nothing_to_train_on_is_refused(numbers: DataConfig, tmp_path: Path) -> None:
    for rows in (40, 41):
        config = numbers.model_copy(update={"test_rows": rows})
        with pytest.raises(InputError, match=rf"data.test_rows is {rows}, but rows has 40 training rows; choose fewer"):
            load_examples(config, "test", 0)
    both = numbers.model_copy(update={"validation_rows": 32})
    with pytest.raises(
        InputError,
        match=r"data.validation_rows is 32, but rows has 32 training rows that test_rows leaves; choose fewer",
    ):
        load_examples(both, "train", 0)
    same = DataConfig(task=str(write(tmp_path / "same.jsonl", ["one 1", "One 1!", " one 1"])), test_rows=1)
    with pytest.raises(InputError, match="every question of its train rows also stands in test; none is left"):
        load_examples(same, "train", 0)


def test_one_file_or_folder_without_a_test_split_names_the_remedy(numbers: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"is one file, so it has no test split; make it a folder with train.jsonl and test.jsonl, "
        r"or set data.test_rows to cut one from train",
    ):
        load_examples(numbers.model_copy(update={"test_rows": 0}), "test", 0)
    write(tmp_path / "own" / "train.jsonl", ["row 1"])
    with pytest.raises(InputError, match=r"has no test.jsonl; set data.test_rows to cut one from train"):
        load_examples(DataConfig(task=str(tmp_path / "own")), "test", 0)
    write(tmp_path / "half" / "test.jsonl", ["row 1"])
    with pytest.raises(InputError, match=r"data .*half: has no train.jsonl$"):
        load_examples(DataConfig(task=str(tmp_path / "half")), "train", 0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def answer(splits: dict[str, int], failure: str = "") -> None:
        def load(_name: str, _configuration: str | None, split: str) -> list[dict[str, Any]]:
            if failure and split not in splits:
                raise ConnectionError(failure)
            if split not in splits:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
            return [{"prompt": f"{split} {i}", "completion": " a"} for i in range(splits[split])]

        monkeypatch.setattr("datasets.load_dataset", load)

    return answer


def test_a_hub_data_set_without_a_test_split_is_cut(hub: Callable[..., None]) -> None:
    hub({"train": 20})
    config = DataConfig(task="someone/data", test_rows=5, validation_rows=3)
    found = parts(config)
    assert [len(rows) for rows in found.values()] == [12, 3, 5]
    assert len({row for rows in found.values() for row in rows}) == 20
    with pytest.raises(InputError, match=r"Unknown split .*; set data.test_rows to cut one from train"):
        load_examples(DataConfig(task="someone/data"), "test", 0)


def test_a_hub_data_set_with_a_test_split_is_not(hub: Callable[..., None]) -> None:
    hub({"train": 20, "test": 7})
    with pytest.raises(
        InputError, match=r"data.test_rows is 5, but there is a test split already \(7 rows on the Hub\)"
    ):
        load_examples(DataConfig(task="someone/data", test_rows=5), "train", 0)


def test_a_hub_that_does_not_answer_is_no_data_set_without_a_test_split(hub: Callable[..., None]) -> None:
    hub({"train": 20}, "the network is off")
    with pytest.raises(
        InputError,
        match=r"data.test_rows is 5, but whether there is a test split already could not be seen on the Hub "
        r"\(the network is off\); try again, or give the rows as a file",
    ):
        load_examples(DataConfig(task="someone/data", test_rows=5), "train", 0)
    with pytest.raises(InputError) as raised:
        load_examples(DataConfig(task="someone/data"), "test", 0)
    assert "test_rows" not in str(raised.value)


def test_the_setting_is_in_a_stages_key() -> None:
    def key(data: DataConfig) -> str:
        return key_of(describe("finetune", {"data": data.model_dump(mode="json")}, {}, 0))

    cut = [key(DataConfig(task="rows.jsonl", test_rows=rows)) for rows in (0, 5, 6)]
    assert len(set(cut)) == 3
    # A recipe that is written out and read again is the same recipe.
    for rows in (0, 5):
        made = parse_config(Recipe, {"name": "n", "model": "m", "data": {"task": "t", "test_rows": rows}}, "here")
        assert parse_config(Recipe, made.model_dump(mode="json"), "here") == made
    with pytest.raises(InputError, match=r"data.test_rows: Input should be greater than or equal to 0"):
        parse_config(Recipe, {"name": "n", "model": "m", "data": {"task": "t", "test_rows": -1}}, "here")
