"""Mixes of tasks, chat templates, task files: rows of the right tasks, guarded across members, asked as they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.data.load import load_examples, load_tasks, member_configs, resolve_task
from sqft.data.tasks import BUILTIN, MIXES, mix_members
from sqft.errors import InputError
from sqft.recipe import DataConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))

    return write


def arc(question: str, key: str = "A") -> dict[str, Any]:
    return {"question": question, "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": key}


def boolq(question: str) -> dict[str, Any]:
    return {"question": question, "passage": "So it is.", "answer": True}


def test_names_of_mixes() -> None:
    assert mix_members("math") == ("gsm8k_instruct", "mawps", "svamp")
    assert len(MIXES["commonsense"]) == 7
    assert mix_members("boolq+arc_easy") == ("boolq", "arc_easy")
    assert mix_members("boolq") == mix_members("boolq+nothing") == ()
    with pytest.raises(InputError, match="is a mix; name one of its tasks: gsm8k_instruct, mawps, svamp"):
        resolve_task(DataConfig(task="math"))
    with pytest.raises(InputError, match="take no template and no options"):
        member_configs(DataConfig(task="math", options={"size": 3}))


def test_a_mix_is_guarded_across_its_members(folder: Callable[..., None]) -> None:
    folder("arc_easy/train", [arc("Ice is what"), arc("shared with boolq's test?"), arc("is in its own test")])
    folder("arc_easy/test", [arc("Is in its own test!"), arc("only arc's")])
    folder("boolq/train", [boolq("is snow white"), boolq("only arc's")])
    folder("boolq/validation", [boolq("Shared with Boolq's test")])
    data = DataConfig(task="arc_easy+boolq")
    train = {task.name: [e.question for e in rows] for task, rows in load_tasks(data, "train")}
    assert train == {"arc_easy": ["Ice is what"], "boolq": ["is snow white"]}
    test = {task.name: len(rows) for task, rows in load_tasks(data, "test")}
    assert test == {"arc_easy": 2, "boolq": 1}
    assert len(load_examples(data, "train", 0)) == 2
    assert len(load_examples(data.model_copy(update={"train_limit": 1}), "train", 0)) == 1


def test_a_mix_trains_on_what_there_is_and_tests_on_all(folder: Callable[..., None], caplog: Any) -> None:
    folder("arc_easy/train", [arc(f"question {i}") for i in range(6)])
    folder("arc_easy/test", [arc("another")])
    folder("piqa/validation", [{"goal": "cut", "sol1": "knife", "sol2": "spoon", "label": 0}])
    data = DataConfig(task="arc_easy+piqa", validation_rows=2)
    with caplog.at_level("INFO", "sqft"):
        assert [task.name for task, _ in load_tasks(data, "train")] == ["arc_easy"]
    assert "leaves piqa out of the train rows of the mix" in caplog.text
    assert [task.name for task, _ in load_tasks(data, "test")] == ["arc_easy", "piqa"]
    validation = load_examples(data, "validation", 0)
    assert len(validation) == 2
    assert not {e.question for e in validation} & {e.question for e in load_examples(data, "train", 0)}
    with pytest.raises(InputError, match="boolq"):
        load_tasks(DataConfig(task="arc_easy+boolq"), "test")


def test_a_member_without_a_split_still_guards_the_others(folder: Callable[..., None]) -> None:
    """SVAMP has a test split alone: its questions must not be selected on or trained on under another name."""
    row = {"Body": "Ann has 3 figs", "Question": "How many figs?", "Answer": "3", "Equation": "3"}
    folder("svamp/test", [row])
    twin = {"question": "Ann has 3 figs. How many figs?", "answer": "3"}
    folder("mawps/train", [twin, {"question": "another", "answer": "1"}])
    folder("mawps/validation", [twin, {"question": "a third", "answer": "1"}])
    folder("mawps/test", [{"question": "reported", "answer": "1"}])
    data = DataConfig(task="mawps+svamp")
    assert [e.question for e in load_examples(data, "validation", 0)] == ["a third"]
    assert [e.question for e in load_examples(data, "train", 0)] == ["another"]


def test_a_malformed_member_is_an_error_and_no_absence(folder: Callable[..., None], tmp_path: Path) -> None:
    folder("arc_easy/train", [arc("fine")])
    folder("arc_easy/test", [arc("reported")])
    folder("boolq/train", [boolq("fine")])
    folder("boolq/validation", [boolq("reported too")])
    (tmp_path / "boolq" / "train.jsonl").write_text("{broken")
    with pytest.raises(InputError, match="malformed"):
        load_examples(DataConfig(task="arc_easy+boolq"), "train", 0)
    folder("boolq/train", [boolq("fine")])
    with pytest.raises(InputError, match="validation_rows is 5"):
        load_examples(DataConfig(task="arc_easy+boolq", validation_rows=5), "train", 0)


def test_mawps_trains_on_the_equation() -> None:
    def answer(equation: str | None, value: str) -> str:
        return BUILTIN["mawps"].build({"question": "q", "answer": value, "equation": equation}).answer  # type: ignore[misc]

    assert answer("X=((22.0-14.0)/4.0)", "2") == " (22-14)/4 = 2"
    assert answer("x=(3.0*7.0+4.0)/(2.0-3.0)", "-25") == " (3*7+4)/(2-3) = -25"
    assert answer("x = 5.91 + 8.110", "14.02") == " 5.91+8.11 = 14.02"
    # Not solved for the answer: the equation would mislead.
    for equation in ("X-6=52", "7=3+x", "x+(1.0/x)=3.3333", "", None):
        assert answer(equation, "58") == " 58"


def test_gsm8k_for_instruction_tuning_has_no_calculator_marks() -> None:
    row = {"question": "How many?", "answer": "6*2 = <<6*2=12>>12 in all.\n#### 12"}
    example = BUILTIN["gsm8k_instruct"].build(row)  # type: ignore[misc]
    assert example.answer == " 6*2 = 12 in all.\nThe answer is 12"
    assert example.prompt.endswith("### Instruction:\nHow many?\n\n### Response:")
    assert BUILTIN["gsm8k_instruct"].folder == "gsm8k"


class Chat:
    """A tokenizer's chat side."""

    chat_template = "yes"
    bos_token, bos_token_id = "<s>", 1

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        return "<s>" + "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>\n"


def test_the_chat_template_asks_and_answers_lose_their_space(folder: Callable[..., None], tmp_path: Path) -> None:
    folder("arc_easy/test", [arc("Ice is what")])
    data = DataConfig(task="arc_easy", chat_template=True)
    (example,) = load_examples(data, "test", 0, Chat())  # type: ignore[arg-type]
    assert example.prompt == "<user>Question: Ice is what\nAnswer:<assistant>\n"
    assert (example.answer, example.choices) == ("one", ("one", "two"))
    with pytest.raises(InputError, match="has no chat template"):
        load_examples(data, "test", 0, None)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    folder("own/train", [{"messages": turns}])
    own = DataConfig(task=str(tmp_path / "own"), chat_template=True)
    with pytest.raises(InputError, match="rows are chats already"):
        load_examples(own, "train", 0, Chat())  # type: ignore[arg-type]
    folder("winogrande/validation", [{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}])
    with pytest.raises(InputError, match="winogrande compares whole sentences"):
        load_examples(DataConfig(task="winogrande", chat_template=True), "test", 0, Chat())  # type: ignore[arg-type]


CHOICE = """
name: trivia
data: rows
metric: choice
prompt: "Question: {q}\\nAnswer:"
choices: "{options}"
gold: right
splits: {test: dev}
"""


def write_task(tmp_path: Path, text: str, rows: list[dict[str, Any]]) -> DataConfig:
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(text)
    return DataConfig(task=str(tmp_path / "task.yaml"))


@pytest.mark.parametrize("right", [1, "1", "B", "b", "two"])
def test_a_task_file_of_choices(tmp_path: Path, right: Any) -> None:
    data = write_task(tmp_path, CHOICE, [{"q": "1 + 1?", "options": ["one", "two"], "right": right}])
    task = resolve_task(data)
    (example,) = load_examples(data, "test", 0)
    assert (task.name, task.metric) == ("trivia", "choice")
    assert example.prompt == "Question: 1 + 1?\nAnswer:"
    assert (example.choices, example.gold, example.answer) == ((" one", " two"), 1, " two")


def test_a_task_file_of_generated_numbers(tmp_path: Path) -> None:
    text = 'name: n\ndata: rows\nmetric: generate\nprompt: "{q}"\nanswer: "{a}"\nuntil: [stop]\nsplits: {test: dev}\n'
    data = write_task(tmp_path, text, [{"q": "2?", "a": 2}])
    (example,) = load_examples(data, "test", 0)
    assert (example.prompt, example.answer) == ("2?", " 2")
    assert (resolve_task(data).until, resolve_task(data).max_new_tokens) == (("stop",), 64)


NUMBERS = 'name: n\ndata: rows\nmetric: generate\nprompt: "{q}"\nanswer: "{a}"\nsplits: {test: dev}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NUMBERS, r"dev.jsonl:2: its answer ' two' has no number for metric generate to compare; use exact"),
        (
            NUMBERS + "marker: '####'\n",
            r"dev.jsonl:1: its answer ' 2' has no number after the marker '####' and a space",
        ),
    ],
)
def test_answers_that_no_generation_could_match_are_named(tmp_path: Path, text: str, message: str) -> None:
    data = write_task(tmp_path, text, [{"q": "1 + 1?", "a": 2}, {"q": "2?", "a": "two"}])
    with pytest.raises(InputError, match=message):
        load_examples(data, "test", 0)


def test_an_empty_choice_is_named(tmp_path: Path) -> None:
    data = write_task(tmp_path, CHOICE, [{"q": "?", "options": ["one", ""], "right": 0}])
    with pytest.raises(InputError, match=r"dev.jsonl:1: one of its 2 choices is empty"):
        load_examples(data, "test", 0)


def test_a_task_file_called_as_a_built_in_task_reads_its_own_rows(
    folder: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder("piqa/validation", [{"goal": "of the built-in", "sol1": "a", "sol2": "b", "label": 0}])
    hub = {"q": "of the Hub", "options": ["one", "two"], "right": 0}
    monkeypatch.setattr("datasets.load_dataset", lambda *_args, **_options: [hub])
    text = CHOICE.replace("trivia", "piqa").replace("data: rows", "data: someone/rows").replace("dev", "validation")
    (tmp_path / "task.yaml").write_text(text)
    (example,) = load_examples(DataConfig(task=str(tmp_path / "task.yaml")), "test", 0)
    assert example.prompt == "Question: of the Hub\nAnswer:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: n", "data: Field required"),
        (CHOICE.replace("gold: right\n", ""), "metric choice needs choices and gold"),
        (CHOICE.replace("choice\n", "exact\n", 1), "metric exact needs answer"),
        (CHOICE + "gould: x\n", "unknown key 'gould'; did you mean 'gold'"),
        ("[1, 2]", "holds list, not a mapping"),
        (":\n  - {", "cannot be read as YAML"),
    ],
)
def test_a_bad_task_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    data = write_task(tmp_path, text, [])
    with pytest.raises(InputError, match=message):
        resolve_task(data)


@pytest.mark.parametrize("right", [2, -1, "C", "three", None, True])
def test_a_gold_that_names_no_choice_is_refused(tmp_path: Path, right: Any) -> None:
    data = write_task(tmp_path, CHOICE, [{"q": "?", "options": ["one", "two"], "right": right}])
    with pytest.raises(InputError, match="is neither an index nor a letter nor a text of its 2 choices"):
        load_examples(data, "test", 0)
