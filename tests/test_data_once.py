"""A run opens every file of its data once, however many stages, splits and models need its rows."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqft.context import Context
from sqft.data.load import Data, load_tasks
from sqft.pipeline import run
from sqft.recipe import DataConfig, Recipe

_watched: list[tuple[Path, Counter[str]]] = []


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | Path):
        folder, counts = _watched[-1]
        if (path := Path(arguments[0])).is_relative_to(folder):
            counts[str(path.relative_to(folder))] += 1


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_count)  # it stays until the process ends


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Counter[str]]:
    """How often each file under the folder `data` was opened."""
    _watched.append((tmp_path / "data", Counter()))
    yield _watched[-1][1]
    _watched.pop()


def write(file: Path, numbers: range) -> None:
    rows = [{"prompt": f"Question: {a} + {b}?\nAnswer:", "completion": f" {a + b}"} for a in numbers for b in (1, 2)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_opens_every_file_once(
    opened: Counter[str], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    monkeypatch.setenv("SQFT_DATA_DIR", str(data))
    for name, numbers in (("own/train", range(12)), ("own/test", range(12, 16)), ("other", range(20, 22))):
        write(data / f"{name}.jsonl", numbers)
    write(data / "more" / "test.jsonl", range(30, 32))
    (data / "more.yaml").write_text('name: m\ndata: more\nmetric: exact\nprompt: "{prompt}"\nanswer: "{completion}"\n')
    (data / "wikitext2").mkdir()
    for part in ("test", "valid"):
        (data / "wikitext2" / f"{part}.txt").write_text("a line of text\n" * 60)
    (data / "plain").write_text("a text of its own " * 40)
    wiki, plain = ({"data": source, "samples": 2, "length": 16} for source in ("wikitext2", str(data / "plain")))
    recipe = {
        "name": "once",
        "model": str(tiny_model("llama", "bfloat16")),
        "data": {"task": str(data / "own"), "validation_rows": 6},
        "sparsify": {"calibration": plain},
        "quantize": {"joint": False, "group_size": 16, "calibration": wiki},
        "finetune": {"kind": "quantized", "ranks": [4, 2], "max_steps": 1, "length": 128, "batch": 2,
                     "evaluate_every": 1},
        "search": {"strategy": "random", "turns": 1, "neighbours": 1},
        "verify": {"prompts": 1, "accuracy_rows": 1},
        "evaluate": {
            "tasks": [str(data / "own"), str(data / "other.jsonl"), str(data / "more.yaml"), "wikitext2"], "limit": 2
        },
    }  # fmt: skip
    opened.clear()
    result = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert result.verified
    assert len(list((tmp_path / "out" / "evaluations").iterdir())) == 5
    # The first bytes of a file without an ending say whether it holds rows; then it is read.
    twice = {"plain": 2}
    files = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    assert opened == {name: twice.get(name, 1) for name in files}


def test_what_is_read_for_one_call_is_read_again_by_the_next(opened: Counter[str], tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", range(4))
    config = DataConfig(task=str(tmp_path / "data"))
    opened.clear()
    for _ in range(2):
        load_tasks(config, "train")
    assert opened == {"train.jsonl": 2}


def test_splits_differ_by_what_is_cut_and_share_what_is_read(opened: Counter[str], tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", range(10))
    whole = DataConfig(task=str(tmp_path / "data"))
    cut = whole.model_copy(update={"test_rows": 3, "validation_rows": 5})
    opened.clear()
    data = Data()
    assert len(data.examples(whole, "train", 0)) == 20
    assert [len(data.examples(cut, split, 0)) for split in ("train", "validation", "test")] == [12, 5, 3]
    limited = whole.model_copy(update={"train_limit": 7})
    assert len(data.examples(limited, "train", 0)) == 7
    assert data.examples(limited, "train", 0) != data.examples(limited, "train", 1)
    assert opened == {"train.jsonl": 1}


def test_a_context_with_another_seed_shares_what_was_read(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    context = Context()
    data = context.data(folder)
    other = context.seeded(5)
    assert other.seed == 5 and context.seed == 0
    assert other.data(folder) is data and other.tokenizer(folder) is context.tokenizer(folder)
