r"""Placeholders: filled, or an error that names the columns; never text of a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqft.data.load import load_examples
from sqft.data.numbers import final_number
from sqft.data.placeholders import fill, parse
from sqft.errors import InputError
from sqft.recipe import DataConfig, Template

ROW = {"q": "2+2?", "вопрос": "Сколько?", "問題": "幾つ", "the answer (en)": "4", "0": "zero", "": "index", "n": 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{q}", "2+2?"),
        ("{вопрос} {問題}", "Сколько? 幾つ"),
        ("{the answer (en)}", "4"),
        ("{n}{n}", "55"),
        ("{0}", "zero"),
        ("no column", "no column"),
        # Braces that are text.
        ("{{1, 2}} {q}", "{1, 2} 2+2?"),
        (r"\frac{{1}}{{2}} {q}", r"\frac{1}{2} 2+2?"),
        (r"\boxed{{{n}}}", r"\boxed{5}"),
        # JSON needs no doubling.
        ('{"a": 1} {q}', '{"a": 1} 2+2?'),
        ('{"answer": "{q}", "of": {"n": {n}}}', '{"answer": "2+2?", "of": {"n": 5}}'),
        ('[{ "a": {}}]'.replace("{}", "{{}}"), '[{ "a": {}}]'),
        ('{\n  "a": "{q}"\n}', '{\n  "a": "2+2?"\n}'),
        ('{{"a": 1}}', '{"a": 1}'),
    ],
)
def test_columns_are_filled_and_other_braces_stay(text: str, expected: str) -> None:
    assert fill(text, ROW) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ q }", r"no column ' q '; its columns are q, вопрос.*\(write \{q\}, or write \{\{ and \}\} for braces"),
        ("{q:>5}", r"no column 'q:>5'; .*write \{q\}"),
        ("{q!r}", r"no column 'q!r'; .*write \{q\}"),
        ("{q.text}", r"no column 'q.text'; .*write \{q\}"),
        ("{q[0]}", r"no column 'q\[0\]'; .*write \{q\}"),
        ("{Q}", "no column 'Q'; its columns are q"),
        ("{ответ}", "no column 'ответ'; its columns are q"),
        ("{1}", r"no column '1'; .*write \{\{ and \}\} for braces that are text"),
        ("{ x: 1 }", r"no column ' x: 1 '; .*write \{\{ and \}\}"),
        (r"\frac{1}{2}", "no column '1'"),
        ("{{q}}", r"\{\{q\}\} would be the text \{q\}; write \{q\} for the column"),
        ("{{ вопрос }}", r"would be the text \{вопрос\}"),
    ],
)
def test_a_placeholder_that_no_column_fills_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(text, ROW)


def test_braces_without_a_column_are_an_error() -> None:
    with pytest.raises(ValueError, match="no column ''; its columns are q"):
        fill("{}", {"q": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question", "a brace that is not closed, at character 1"),
        ("question}", "a closing brace that closes nothing, at character 9"),
        ("{a{b}}", "a brace that is not closed, at character 1"),
        ('{"a": 1', "1 more opening braces than closing ones"),
        ('{"a": 1}}"', "a closing brace that closes nothing"),
    ],
)
def test_braces_without_a_partner_are_an_error_of_the_template(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    template = Template(prompt="{q}", completion=text)
    with pytest.raises(InputError, match=rf"data.template.completion .*: has .*{message}"):
        load_examples(DataConfig(task=str(tmp_path / "rows.jsonl"), template=template), "train", 0)
    settings = {"name": "t", "data": "rows.jsonl", "metric": "exact", "prompt": text, "answer": "{q}"}
    (tmp_path / "task.yaml").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"task.yaml: .*has .*{message}"):
        load_examples(DataConfig(task=str(tmp_path / "task.yaml")), "train", 0)


@pytest.mark.parametrize("number", [1e-05, 2.5e-07, 1e22, -3.5, 7, -0.001, 123456789012345680000.0, 1e300, 2**70])
def test_a_number_is_read_back_as_the_same_number(number: float) -> None:
    text = fill(" {a}", {"a": json.loads(json.dumps(number))})
    assert final_number(text) == float(number)
    assert final_number(f"#### {text.strip()}.", "####") == float(number)


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, float("nan"), float("inf")])
def test_values_that_are_no_text_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"its column 'a' is .*(not text or a number|which is no number)"):
        fill("{a}", {"a": value})


def test_placeholders_of_task_files(tmp_path: Path) -> None:
    row = {"вопрос": "Что?", "варианты": ["лёд", "снег"], "верно": "снег", "a": 1e-05, "b": "∞"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = tmp_path / "task.yaml"

    def load(**settings: object) -> list[object]:
        given = {"name": "t", "data": "rows.jsonl", "prompt": "{вопрос}", **settings}
        task.write_text(json.dumps(given))
        return [vars(example) for example in load_examples(DataConfig(task=str(task)), "train", 0)]

    (example,) = load(metric="choice", choices="{варианты}", gold="верно")
    assert example["choices"] == (" лёд", " снег") and example["gold"] == 1  # type: ignore[index]
    with pytest.raises(InputError, match=r"rows.jsonl:1: has no column ' варианты '; its columns are вопрос"):
        load(metric="choice", choices="{ варианты }", gold="верно")
    with pytest.raises(InputError, match="has no column 'c'; its columns are вопрос"):
        load(metric="choice", choices=["{a}", "{c}"], gold="верно")
    with pytest.raises(InputError, match="name no column that holds a list"):
        load(metric="choice", choices="{варианты} ", gold="верно")
    (example,) = load(metric="generate", answer="{a}")
    assert final_number(example["answer"]) == 1e-05  # type: ignore[index]
    for text in ("{b}", "1e999"):
        with pytest.raises(InputError, match="has no number for metric generate to compare"):
            load(metric="generate", answer=text)
