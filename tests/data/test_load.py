from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sqft.data.load import Data, load_examples, resolve_task
from sqft.data.sources import data_folder
from sqft.data.tasks import BUILTIN, Example, normalise
from sqft.errors import InputError
from sqft.recipe import DataConfig, Template

QA = Template(prompt="Question: {question}\nAnswer:", completion=" {answer}")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(prefix: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{prefix} {i}", "completion": f" {i}"} for i in range(count)]


def prompts(examples: list[Example]) -> list[str]:
    return [example.prompt for example in examples]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: Any, **_options: Any) -> None:
        raise ConnectionError("the network is off\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None) -> Path:
    """An own folder of built-in data, and no network."""
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    return tmp_path


# ---- own data ----


def test_prompt_and_completion_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "my rows.jsonl", [{"prompt": "a:", "completion": " b", "note": 1}])
    config = DataConfig(task=str(file))
    assert load_examples(config, "train", 0) == [Example("a:", " b")]
    task = resolve_task(config)
    assert (task.name, task.metric) == ("my rows", "exact")


def test_columns_that_a_template_names(tmp_path: Path) -> None:
    rows = [{"question": "2 {x} 3?", "answer": 5, "weight": 0.5}]
    file = write(tmp_path / "rows.jsonl", rows)
    template = Template(prompt='{question} as {"json": 1} at {weight}:', completion=" {answer}")
    config = DataConfig(task=str(file), template=template)
    assert load_examples(config, "train", 0) == [Example('2 {x} 3? as {"json": 1} at 0.5:', " 5")]


def test_chats_are_rendered_with_the_models_template(tmp_path: Path, tiny_tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    file = write(tmp_path / "chats.jsonl", [{"messages": chat}])
    config = DataConfig(task=str(file))
    expected = Example("<|user|>hi<|end|><|assistant|>hello<|end|><|user|>bye<|end|><|assistant|>", "see you")
    assert load_examples(config, "train", 0, tiny_tokenizer) == [expected]
    with pytest.raises(InputError, match=r"rows are chats .* no chat template"):
        load_examples(config, "train", 0)


def test_a_chat_template_s_beginning_token_is_not_doubled(tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from conftest import build_tokenizer

    plain = build_tokenizer()
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", plain.convert_tokens_to_ids("<|user|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token="<|user|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = plain.chat_template
    file = write(
        tmp_path / "c.jsonl",
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}],
    )
    (example,) = load_examples(DataConfig(task=str(file)), "train", 0, tokenizer)
    assert example.prompt == "hi<|end|><|assistant|>"
    assert tokenizer(example.prompt)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_template_that_drops_its_generation_prompt_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    file = write(tmp_path / "c.jsonl", rows)
    with pytest.raises(InputError, match=r"c.jsonl:1: the chat template does not continue its own generation prompt"):
        load_examples(DataConfig(task=str(file)), "train", 0, tokenizer)


def test_a_template_that_raises_is_an_error_and_no_traceback(tmp_path: Path, tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    rows = [{"messages": [{"role": "system", "content": "be"}, {"role": "assistant", "content": "yo"}]}]
    file = write(tmp_path / "c.jsonl", rows)
    with pytest.raises(InputError, match=r"c.jsonl:1: .*refuses the turns system, assistant \(no system turns\)"):
        load_examples(DataConfig(task=str(file)), "train", 0, tokenizer)
    plain = DataConfig(task=str(write(tmp_path / "p.jsonl", numbered("row", 2))), chat_template=True)
    with pytest.raises(InputError, match=r"data.chat_template: .*refuses the turns user .*; set it to false"):
        load_examples(plain, "train", 0, tokenizer)


def test_every_malformed_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    good = b'{"prompt": "a", "completion": " b"}\n'
    bad = [
        b'{"prompt": "a"\n',
        b"[1, 2]\n",
        b'{"prompt": "\xff", "completion": " b"}\n',
        b'{"prompt": "a", "reply": " b"}\n',
        b'{"prompt": 3, "completion": " b"}\n',
        b'{"prompt": "a", "completion": "  "}\n',
        b'{"text": "a"}\n',
    ]
    file.write_bytes(good + b"\n" + b"".join(bad) + good)
    with pytest.raises(InputError) as raised:
        load_examples(DataConfig(task=str(file)), "train", 0)
    text = str(raised.value)
    assert "7 of 9 rows are malformed" in text
    for number, message in [
        (3, "is not JSON (Expecting ',' delimiter at column 15)"),
        (4, "holds list, not an object of columns"),
        (5, "is not UTF-8 text (byte 12)"),
        (6, "has no column 'completion'; its columns are prompt, reply"),
        (7, "its prompt is int, not text"),
        (8, "has an empty prompt or an empty answer"),
        (9, "has neither prompt and completion nor messages; its columns are text: say in data.template"),
    ]:
        assert f"{file}:{number}: {message}" in text


def test_ten_malformed_lines_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.jsonl", [{"other": i} for i in range(25)])
    with pytest.raises(InputError) as raised:
        load_examples(DataConfig(task=str(file), template=QA), "train", 0)
    text = str(raised.value)
    assert "25 of 25 rows are malformed" in text
    assert f"{file}:10: has no column 'question'; its columns are other" in text
    assert f"{file}:11:" not in text
    assert "and 15 more" in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "not a list of objects, nor the JSON text of one"),
        ([{"role": "user"}], "not a list of {role, content}"),
        ([{"role": "assistant", "content": "alone"}], "do not end with an answer"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "do not end with an answer"),
    ],
)
def test_malformed_chats_are_named(tmp_path: Path, tiny_tokenizer: Any, messages: Any, message: str) -> None:
    file = write(tmp_path / "chats.jsonl", [{"messages": messages}])
    with pytest.raises(InputError, match=f"chats.jsonl:1: its messages .*{message}"):
        load_examples(DataConfig(task=str(file)), "train", 0, tiny_tokenizer)


def test_a_byte_order_mark_and_line_separators_in_texts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b", "completion": " c"}\r\n\r\n'.encode())
    assert Data().file(file, None) == [Example("a\u2028b", " c")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "smile \ud83d here", "completion": " yes"},
            r"its prompt has half a character \(U\+D83D, character 7\)",
        ),
        ({"prompt": "smile", "completion": " \udc00"}, r"its answer has half a character \(U\+DC00, character 2\)"),
        ({"prompt": "", "completion": "", "\ud83d": ""}, "has an empty prompt"),
        ({"\ud83d": ""}, r".*its columns are \\ud83d: say in data.template"),
    ],
)
def test_half_a_character_is_refused_with_its_line(tmp_path: Path, row: dict[str, str], message: str) -> None:
    file = write(tmp_path / "rows.jsonl", [*numbered("row", 2), row])
    with pytest.raises(InputError, match=f"rows.jsonl:3: {message}") as raised:
        load_examples(DataConfig(task=str(file)), "train", 0)
    assert str(raised.value).encode()  # the message itself can be printed
    whole = write(tmp_path / "whole.jsonl", [{"prompt": "smile \U0001f600", "completion": " yes"}])
    assert load_examples(DataConfig(task=str(whole)), "train", 0) == [Example("smile \U0001f600", " yes")]


def test_half_a_character_in_templates_choices_and_chats_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    half = "\ud83d"
    row = {
        "q": "a",
        "options": ["a", half],
        "messages": [{"role": "user", "content": half}, {"role": "assistant", "content": "a"}],
    }
    file = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=r"rows.jsonl:1: its prompt has half a character"):
        load_examples(DataConfig(task=str(file)), "train", 0, tiny_tokenizer)
    template = Template(prompt="{q}" + half, completion=" a")
    with pytest.raises(InputError, match=r"rows.jsonl:1: its prompt has half a character"):
        load_examples(DataConfig(task=str(file), template=template), "train", 0)
    settings = {
        "name": "t",
        "data": "rows.jsonl",
        "metric": "choice",
        "prompt": "{q}",
        "choices": "{options}",
        "gold": "q",
    }
    (tmp_path / "task.yaml").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"rows.jsonl:1: its text among its choices has half a character"):
        load_examples(DataConfig(task=str(tmp_path / "task.yaml")), "train", 0)


def test_empty_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty.jsonl .train.: has no rows"):
        load_examples(DataConfig(task=str(tmp_path / "empty.jsonl")), "train", 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"none of train.jsonl, validation.jsonl, test.jsonl"):
        load_examples(DataConfig(task=str(tmp_path / "folder")), "train", 0)


# ---- splits and guards ----


def test_folders_have_splits_and_single_files_have_none(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for split in ("train", "test"):
        write(own / f"{split}.jsonl", numbered(split, 3))
    config = DataConfig(task=str(own))
    assert prompts(load_examples(config, "test", 0)) == ["test 0", "test 1", "test 2"]
    with pytest.raises(InputError, match=r"has no validation.jsonl; set data.validation_rows to cut one from train"):
        load_examples(config, "validation", 0)
    single = DataConfig(task=str(own / "train.jsonl"))
    with pytest.raises(InputError, match="is one file, so it has no test split; make it a folder"):
        load_examples(single, "test", 0)
    with pytest.raises(InputError, match=r"is one file, so it has no validation split.*or set data.validation_rows"):
        load_examples(single, "validation", 0)
    assert len(load_examples(single.model_copy(update={"validation_rows": 1}), "validation", 0)) == 1


def test_questions_of_test_and_validation_are_removed_from_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own"
    write(own / "train.jsonl", [*numbered("row", 4), {"prompt": "What, is ICE?", "completion": " a"}])
    write(
        own / "validation.jsonl",
        [{"prompt": "ROW  3!", "completion": " x"}, {"prompt": "what is ice", "completion": " x"}],
    )
    write(own / "test.jsonl", [{"prompt": "what is ice", "completion": " b"}])
    config = DataConfig(task=str(own))
    with caplog.at_level(logging.INFO, "sqft"):
        assert prompts(load_examples(config, "train", 0)) == ["row 0", "row 1", "row 2"]
    assert "own: removed 1 of 5 train rows whose question stands in test" in caplog.text
    assert "own: removed 1 of 4 train rows whose question stands in validation" in caplog.text
    # What is selected on is never what is reported.
    assert prompts(load_examples(config, "validation", 0)) == ["ROW  3!"]


def test_train_that_stands_in_test_as_a_whole_is_an_error(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", numbered("row", 3))
    with pytest.raises(InputError, match="every question of its train rows also stands in test; none is left"):
        load_examples(DataConfig(task=str(tmp_path)), "train", 0)


def test_validation_rows_are_cut_from_train_whatever_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*numbered("train", 40), *numbered("Train", 40)])
    write(tmp_path / "validation.jsonl", numbered("validation", 4))
    write(tmp_path / "test.jsonl", numbered("train", 3))
    config = DataConfig(task=str(tmp_path), validation_rows=10)
    cut = load_examples(config, "validation", 0)
    assert cut == load_examples(config, "validation", 7)
    assert len(cut) == 10
    assert prompts(cut) != [f"train {i}" for i in range(3, 13)]
    assert all(p.startswith(("train", "Train")) for p in prompts(cut))
    train = load_examples(config, "train", 0)
    folded = [{normalise(p) for p in prompts(part)} for part in (train, cut, load_examples(config, "test", 0))]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert not folded[first] & folded[second]
    with pytest.raises(InputError, match=r"data.validation_rows is 74, but .* has 74 training rows; choose fewer"):
        load_examples(config.model_copy(update={"validation_rows": 74}), "train", 0)


def test_train_limit_draws_by_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", numbered("row", 100))
    config = DataConfig(task=str(file), train_limit=10)
    first = load_examples(config, "train", 0)
    assert len(set(prompts(first))) == 10
    assert first == load_examples(config, "train", 0) != load_examples(config, "train", 1)
    assert prompts(first) != [f"row {i}" for i in range(10)]
    assert len(load_examples(config.model_copy(update={"train_limit": 500}), "train", 0)) == 100


# ---- built-in data: folder and Hub ----


def arc_row(question: str) -> dict[str, Any]:
    return {"question": question, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}


def test_a_split_that_is_nowhere_says_what_was_looked_for(folder: Path) -> None:
    write(folder / "arc_easy" / "train.jsonl", [arc_row("q")])
    config = DataConfig(task="arc_easy")
    with pytest.raises(InputError) as raised:
        load_examples(config, "test", 0)
    assert str(raised.value) == (
        f"data arc_easy: no test split: looked for the file {folder}/arc_easy/test.jsonl and for the Hub data set "
        "allenai/ai2_arc (ARC-Easy), split 'test' (the network is off)"
    )
    with pytest.raises(InputError, match=r"no validation split: .*; set data.validation_rows to cut one from train"):
        load_examples(config, "validation", 0)
    with pytest.raises(InputError, match=r"data piqa: no test split: .*piqa/validation.jsonl .*baber/piqa, split 'val"):
        load_examples(DataConfig(task="piqa"), "test", 0)
    with pytest.raises(InputError, match=r"data gsm8k: has no validation split; set data.validation_rows"):
        load_examples(DataConfig(task="gsm8k"), "validation", 0)
    with pytest.raises(InputError, match="data svamp: has no train split"):
        load_examples(DataConfig(task="svamp"), "train", 0)
    # Training goes on without the guards that have nothing to look at.
    assert len(load_examples(config, "train", 0)) == 1


def test_what_the_hub_did_not_have_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(name: str, *_args: Any, split: str) -> list[dict[str, Any]]:
        asked.append(f"{name} {split}")
        raise ConnectionError("no network")

    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for _ in range(2):
        with pytest.raises(InputError, match=r"the Hub data set openai/gsm8k \(main\), split 'test' \(no network\)"):
            load_examples(DataConfig(task="gsm8k"), "test", 0)
    assert asked == ["openai/gsm8k test"]


def test_no_folder_at_all_is_said(no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.data.sources.data_folder", lambda: None)
    with pytest.raises(InputError, match=r"looked for a local folder \(SQFT_DATA_DIR is not set\) and for the Hub"):
        load_examples(DataConfig(task="gsm8k"), "test", 0)


def test_the_folder_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"SQFT_DATA_DIR is .*nowhere, which is not a folder"):
        data_folder()
    monkeypatch.delenv("SQFT_DATA_DIR")
    (tmp_path / "work").mkdir()
    (tmp_path / "shared" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert data_folder() == tmp_path / "shared" / "data"


def test_the_hub_is_asked_for_its_own_split_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def hub(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return {
            "ChilleD/SVAMP": [{"Body": "One", "Question": "How?", "Answer": "1"}],
            "baber/piqa": [{"goal": f"g {split}", "sol1": "a", "sol2": "b", "label": 1}],
            "someone/data": [{"question": f"q {split}", "answer": 1}],
        }[name]

    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", hub)
    load_examples(DataConfig(task="svamp"), "test", 0)
    assert asked == [("ChilleD/SVAMP", None, "train+test")]
    asked.clear()
    train = load_examples(DataConfig(task="piqa"), "train", 0)
    assert prompts(train) == ["Question: g train\nAnswer:"]
    assert asked == [("baber/piqa", None, "validation"), ("baber/piqa", None, "train")]
    own = DataConfig(task="someone/data", template=QA)
    assert prompts(load_examples(own, "test", 0)) == ["Question: q test\nAnswer:"]
    with pytest.raises(InputError, match=r"row 0: has neither prompt and completion nor messages.*data.template"):
        load_examples(DataConfig(task="someone/data"), "test", 0)


def test_the_revision_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def hub(name: str, configuration: str | None, split: str, revision: str | None = None) -> list[dict[str, Any]]:
        asked.append(revision)
        if revision == "gone":
            raise ConnectionError("no such revision")
        return [{"question": f"q {split}", "answer": 1}]

    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", hub)
    for revision in (None, "v1"):
        config = DataConfig(task="someone/data", template=QA, revision=revision)
        assert len(load_examples(config, "test", 0)) == 1
    gone = DataConfig(task="someone/data", template=QA, revision="gone")
    for _ in range(2):
        with pytest.raises(InputError, match="no such revision"):
            load_examples(gone, "test", 0)
    # What one revision has not, another may have; each is asked for once.
    assert load_examples(config, "test", 0)
    assert asked == [None, "v1", "gone", "v1"]


@pytest.mark.parametrize("task", ["rows.jsonl", "gym:chain_sum", "task.yaml"])
def test_only_data_sets_of_the_hub_have_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", numbered("row", 2))
    settings = {"name": "t", "data": "rows.jsonl", "metric": "exact", "prompt": "{prompt}", "answer": "{completion}"}
    (tmp_path / "task.yaml").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=f"data.revision: only data sets of the Hub have revisions, and {task} is none"
    ):
        resolve_task(DataConfig(task=task, revision="main"))
    with pytest.raises(InputError, match="several data sets have no one revision"):
        load_examples(DataConfig(task="boolq+piqa", revision="main"), "train", 0)


def test_built_in_rows_of_a_folder_have_no_revision(folder: Path) -> None:
    write(folder / "arc_easy" / "test.jsonl", [arc_row("q")])
    with pytest.raises(InputError, match=r"data.revision: the rows are those of the file .*test.jsonl, which has none"):
        load_examples(DataConfig(task="arc_easy", revision="main"), "test", 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task": "data/nowhere.parquet"}, "neither a file or folder here"),
        ({"task": "~/nowhere"}, "neither a file or folder here"),
        ({"task": "~nobody-of-this-name/rows"}, "neither a file or folder here"),
        ({"task": "gsm8"}, "did you mean 'gsm8k'"),
        ({"task": "./nowhere.jsonl"}, "neither a file or folder here"),
        ({"task": "data/nowhere.jsonl"}, "neither a file or folder here"),
        ({"task": "gsm8k", "template": QA}, "gsm8k is built in and has its own wording"),
        ({"task": "gsm8k", "options": {"size": 3}}, "only 'gym:NAME' tasks have options"),
        ({"task": "someone/data", "options": {"size": 3}}, "only 'gym:NAME' tasks have options"),
    ],
)
def test_unusable_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_task(DataConfig(**config))


# ---- the public data ----


def test_every_public_row_reads_and_overlaps_are_those_known(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_hub: None
) -> None:
    monkeypatch.setenv("SQFT_DATA_DIR", str(data_dir))
    rows = {
        "gsm8k": 1319, "gsm8k_instruct": 1319, "mawps": 238, "svamp": 1000, "boolq": 3270, "piqa": 1838,
        "hellaswag": 10042, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500,
    }  # fmt: skip
    assert {name: len(load_examples(DataConfig(task=name), "test", 0)) for name in BUILTIN} == rows
    # The data's README counts test rows (7, 7, 23, 1); two train rows of ARC-e and two test rows of ARC-c are twins.
    overlaps = {"arc_easy": 8, "arc_challenge": 6, "openbookqa": 23, "boolq": 1}
    for name, count in overlaps.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "sqft"):
            load_examples(DataConfig(task=name), "train", 0)
        assert f"{name}: removed {count} of" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "sqft"):
        load_examples(DataConfig(task="mawps"), "train", 0)
    assert "removed" not in caplog.text
    assert sum("unseen" in e.tags for e in load_examples(DataConfig(task="mawps"), "test", 0)) == 238 - 42


def test_the_validation_cut_of_public_data_is_not_reported(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQFT_DATA_DIR", str(data_dir))
    config = DataConfig(task="openbookqa", validation_rows=200)
    parts = [load_examples(config, split, 3) for split in ("train", "validation", "test")]
    folded = [{normalise(example.question) for example in part} for part in parts]
    assert len(parts[1]) == 200
    assert not folded[0] & folded[1] and not folded[1] & folded[2] and not folded[0] & folded[2]
