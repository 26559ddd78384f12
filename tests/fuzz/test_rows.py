"""Damaged rows, chats and task files, and numbers of any form."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from fuzz.damage import TEXTS, copied, damaged, edited, json_bytes, outcome, put, share, values
from sqft.data.load import load_examples
from sqft.data.numbers import final_number
from sqft.recipe import DataConfig, Template

ROWS = [
    {"prompt": "2 + 3 =", "completion": " 5", "question": "2 + 3?", "answer": 5, "options": ["5", "6"], "label": "A"},
    {"prompt": "é 🙂", "completion": " −1.5e3", "question": "", "answer": "#### 7", "options": ["x", "y"], "label": 1},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHAT = {
    "messages": [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "5", "name": "add"},
        {"role": "assistant", "content": "It is 5."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}],
    "documents": [{"title": "a", "text": "b"}],
    "chat_template_kwargs": {"date": "today"},
}
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents %}{{ d.text }}{% endfor %}{{ date }}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ m.reasoning_content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLACEHOLDERS = st.lists(
    st.sampled_from(
        [
            "{question}",
            "{answer}",
            "{options}",
            "{label}",
            "{",
            "}",
            "{{",
            "}}",
            '{"a": ',
            "{ x }",
            "{}",
            "\n",
            " ",
            "é",
        ]
    ),
    max_size=4,
).map("".join)
NAMES = [
    "rows.jsonl",
    "rows.json",
    "rows.csv",
    "rows.tsv",
    "rows.parquet",
    "rows.csv.gz",
    "rows.jsonl.gz",
    "rows.ndjson.xz",
    "rows",
]
TASKS = [
    {
        "name": "t",
        "data": "rows.jsonl",
        "metric": "choice",
        "prompt": "{question}",
        "choices": "{options}",
        "gold": "label",
    },
    {
        "name": "t",
        "data": "rows.jsonl",
        "metric": "choice",
        "prompt": "{question}",
        "choices": ["{answer}", "x"],
        "gold": "answer",
    },
    {
        "name": "t",
        "data": "rows.jsonl",
        "metric": "generate",
        "prompt": "{question}",
        "answer": "{answer}",
        "marker": "####",
    },
    {
        "name": "t",
        "data": "./rows.jsonl",
        "metric": "exact",
        "prompt": "{question}",
        "answer": "{answer}",
        "until": ["\n"],
        "splits": {"test": "train"},
    },
]


def csv_text(rows: list[Any], separator: str) -> str:
    """Return rows as a table, whatever they are."""
    stream = io.StringIO()
    objects = [row for row in rows if isinstance(row, dict)]
    writer = csv.writer(stream, delimiter=separator)
    writer.writerow(dict.fromkeys(name for row in objects for name in row))
    writer.writerows(list(row.values()) for row in objects)
    return stream.getvalue()


def parquet_bytes(rows: list[Any]) -> bytes:
    """Return rows as parquet, or as JSON where Arrow has no type for them."""
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    except Exception:  # whatever its conversion raises
        return json.dumps(rows).encode("utf-8", "surrogatepass")
    return stream.getvalue()


@st.composite
def row_files(draw: st.DrawFn, rows: st.SearchStrategy[list[Any]]) -> bytes:
    """Return rows in a form that is read, in an encoding, compressed or not, damaged or not."""
    found = draw(rows.filter(lambda value: isinstance(value, list)))
    kind = draw(
        st.sampled_from(["lines", "lines", "lines", "array", "pretty", "csv", "tsv", "parquet", "damaged lines"])
    )
    if kind == "parquet":
        content = parquet_bytes(found)
    else:
        ascii_only = draw(st.booleans())
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in found]
        if kind == "damaged lines":
            lines = [draw(json_bytes(st.just(row))).decode("utf-8", "surrogateescape") for row in found]
        text = {
            "array": json.dumps(found, ensure_ascii=ascii_only),
            "pretty": json.dumps(found, indent=1),
            "csv": csv_text(found, draw(st.sampled_from([",", ";"]))),
            "tsv": csv_text(found, "\t"),
        }.get(kind, draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r", "\u2028"])).join(lines))
        encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]))
        errors = "surrogateescape" if kind == "damaged lines" and encoding == "utf-8" else "surrogatepass"
        content = text.encode(encoding, errors)
    if draw(st.integers(0, 5)) == 0:
        content = draw(damaged(content))
    content = draw(st.sampled_from([bytes] * 5 + [gzip.compress, bz2.compress, lzma.compress]))(content)
    return draw(damaged(content)) if draw(st.integers(0, 9)) == 0 else content


@st.composite
def templates(draw: st.DrawFn) -> Template | None:
    if draw(st.booleans()):
        return None
    return Template(prompt=draw(PLACEHOLDERS) or "{question}", completion=draw(PLACEHOLDERS) or " {answer}")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    """A tokenizer whose chat template shows tools, documents, reasoning and parts."""
    import copy

    made = copy.deepcopy(tiny_tokenizer)
    made.chat_template = TOOLS
    return made


def load(place: Path, config: DataConfig, tokenizer: Any, names: str) -> None:
    """Load all splits; what comes is text that a tokenizer reads."""
    for split in ("train", "validation", "test"):
        found = outcome(lambda: load_examples(config, split, 0, tokenizer), names, leaves=place)  # noqa: B023
        for one in found or []:
            assert one.prompt.strip()
            assert one.answer.strip()
            f"{one}".encode()


@share(0.12)
@given(
    row_files(edited(ROWS)),
    st.sampled_from(NAMES),
    templates(),
    st.sampled_from([{}, {}, {"test_rows": 1}, {"validation_rows": 1}, {"chat_template": True}, {"train_limit": 1}]),
)
def test_rows_are_read_or_refused(
    tokenizer: Any, content: bytes, name: str, template: Template | None, settings: dict[str, Any]
) -> None:
    with copied() as place:
        file = put(place, name, content)
        load(place, DataConfig(task=str(file), template=template, **settings), tokenizer, "")


@share(0.08)
@given(row_files(edited([CHAT, {"messages": CHAT["messages"][:1] + CHAT["messages"][-1:]}], most=2)))
def test_chats_are_read_or_refused(tokenizer: Any, content: bytes) -> None:
    with copied() as place:
        file = put(place, "rows.jsonl", content)
        load(place, DataConfig(task=str(file)), tokenizer, "rows.jsonl")


@share(0.1)
@given(
    st.sampled_from(TASKS).flatmap(lambda task: edited(task, st.one_of(PLACEHOLDERS, values()), most=2)),
    edited(ROWS, most=1),
    st.sampled_from(["", "", "", "!!int x", "&a [*a]", "2024-13-45", "9" * 5000, "[" * 600, "\x00", "{? [a] : b}"]),
)
def test_task_files_are_read_or_refused(tokenizer: Any, task: Any, rows: Any, piece: str) -> None:
    # What names no file here may be a data set of the Hub, which tests do not ask.
    assume(not isinstance(task, dict) or str(task.get("data", "")).endswith("rows.jsonl"))
    with copied() as place:
        put(place, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode() if isinstance(rows, list) else b"")
        text = yaml.safe_dump(task) + (f"note: {piece}\n" if piece else "")
        file = put(place, "task.yaml", text.encode("utf-8", "surrogatepass"))
        load(place, DataConfig(task=str(file)), tokenizer, "")


@share(0.06)
@given(
    st.one_of(st.text(), st.text("0123456789.,-+eE−﹣#$ ٣²"), st.text("0123456789", min_size=300, max_size=500)), TEXTS
)
def test_the_final_number_of_any_text_is_a_number_or_none(text: str, marker: str) -> None:
    for found in (final_number(text), final_number(text, marker)):
        assert found is None or isinstance(found, float)


@share(0.06)
@given(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", "The answer is ", "x = ", "1 + 2 = ", "$"])
)
def test_a_number_that_was_written_is_read_back(number: float, before: str) -> None:
    for form in ("{!r}", "{:.17g}", "{:.17e}", "{:,}", "{:E}", "{:f}"):
        written = form.format(number)
        assert final_number(f"{before}{written}") == float(written.replace(",", ""))
        assert final_number(f"#### {written}.", "####") == float(written.replace(",", ""))
        assert final_number(f"{before}{written} ".replace("-", "−")) == float(written.replace(",", ""))
