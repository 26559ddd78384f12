"""Files of rows: what they are is seen, what they hold arrives as it stands, and what cannot be read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sqft.data.files import holds_rows, split_name
from sqft.data.load import Data, load_examples
from sqft.data.tasks import Example
from sqft.disk import local_path
from sqft.errors import InputError
from sqft.recipe import DataConfig, Template

# Texts that readers like to turn into dates, numbers and nothing.
ROWS = [
    {"prompt": "2024-02-29T00:00:00", "completion": " 007"},
    {"prompt": "1e5", "completion": " 2024-02-29"},
    {"prompt": 'a, "quoted"\nquestion', "completion": " null"},
    {"prompt": "ça va? 你好", "completion": " NA"},
]
EXAMPLES = [Example(row["prompt"], row["completion"]) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    Dataset.from_list(rows).to_parquet(stream)
    return stream.getvalue()


def table(separator: str = ",", header: tuple[str, ...] = ("prompt", "completion")) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator)
    writer.writerow(header)
    writer.writerows(row.values() for row in ROWS)
    return stream.getvalue()


def pandas_table() -> str:
    import pandas

    return pandas.DataFrame(ROWS).to_csv()  # with its index, a column without a name


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return stream.getvalue()


READ: dict[str, Callable[[], str | bytes]] = {
    "rows.jsonl": lambda: LINES,
    "rows.ndjson": lambda: LINES,
    "rows.json": lambda: ARRAY,
    "one-line.json": lambda: json.dumps(ROWS),
    "rows.csv": table,
    "rows.tsv": lambda: table("\t"),
    "semicolons.csv": lambda: table(";"),
    "pandas.csv": pandas_table,
    "excel.csv": lambda: "\ufeff" + table(),
    "excel-unicode.csv": lambda: table("\t").encode("utf-16"),
    "rows.parquet": lambda: parquet(ROWS),
    "rows.jsonl.gz": lambda: gzip.compress(LINES.encode(), mtime=0),
    "rows.json.bz2": lambda: bz2.compress(ARRAY.encode()),
    "rows.csv.xz": lambda: lzma.compress(table().encode()),
    "utf-16.jsonl": lambda: LINES.encode("utf-16"),
    "utf-16-be.jsonl": lambda: LINES.encode("utf-16-be"),
    "utf-32.jsonl": lambda: LINES.encode("utf-32"),
    # Content goes before the name.
    "parquet-called.jsonl": lambda: parquet(ROWS),
    "gzip-called.jsonl": lambda: gzip.compress(LINES.encode(), mtime=0),
    "gzip-of-parquet": lambda: gzip.compress(parquet(ROWS), mtime=0),
    "array-called.jsonl": lambda: ARRAY,
    "lines-called.csv": lambda: LINES,
    "array-called.csv": lambda: ARRAY,
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", READ)
def test_rows_of_every_kind_of_file_arrive_as_they_stand(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, READ[name]())
    assert load_examples(DataConfig(task=str(file)), "train", 0) == EXAMPLES


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "rows.zip": (zipped(), "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    "zip-called.jsonl": (zipped(), "is a zip archive or an Excel workbook"),
    "rows.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"x" * 30, "is zstandard-compressed data; unpack it"),
    "rows.arrow": (b"ARROW1\x00\x00" + b"x" * 30, r"is an Arrow file; write parquet: .*to_parquet"),
    "rows.pkl": (pickle.dumps(ROWS), "is a Python pickle, which is never opened; write its rows as JSON lines"),
    "lfs.parquet": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a pointer of Git LFS.*git lfs"),
    "page.jsonl": ("<!DOCTYPE html>\n<html>\n</html>\n", r"the first is '<!DOCTYPE html>'; a web page or XML"),
    "csv-called.jsonl": (table(), r"is not JSON lines: no line begins with a brace, .*if it is CSV, name it so"),
    "words.txt": ("- prompt: a\n  completion: b\n", "is not JSON lines: no line begins with a brace"),
    "pretty.jsonl": (json.dumps(ROWS[0], indent=1) * 2, r"first object spans several lines.*jq -c \. pretty.jsonl"),
    "nested.json": (json.dumps({"data": ROWS}, indent=1), r"its keys are data.*jq -c '\.data\[\]' nested.json"),
    "cut.json": (ARRAY[:60], "is a JSON array that cannot be read"),
    "deep.json": ("[" * 100_000, "is a JSON array that cannot be read"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode(), mtime=0)[:40], "is gzip-compressed data that cannot be unpacked"),
    "cut.parquet": (parquet(ROWS)[:100], "is a parquet file that cannot be read"),
    "cut-utf-16.jsonl": (LINES.encode("utf-16")[:-1], "looks like UTF-16 text, but is not"),
    "binary.jsonl": (b"\0" * 50, "looks like UTF-32-BE text, but is not"),
    "latin-1.csv": ("prompt,completion\n\xe4,b\n".encode("latin-1"), r"is CSV, but not in UTF-8 \(byte 18\); .*iconv"),
    "quotes.csv": ('prompt,completion\n"a,b\n', r"quotes.csv:2: is not valid CSV \(unexpected end of data\)"),
    "twice.csv": (table(header=("prompt", "prompt")), "two columns have the same name: prompt, prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    file = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as raised:
        load_examples(DataConfig(task=str(file)), "train", 0)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,completion\na,b\nc\nd,e,f\n\ng,h\n", "a.csv:3: has 1 cells and the first line 2"),
        ("b.csv", "prompt,completion\na,b\nc\nd,e,f\n\ng,h\n", "b.csv:4: has 3 cells and the first line 2"),
        ("a.json", "[1, 2]", "a.json, row 1: holds int, not an object of columns"),
        ("a.jsonl", "[1]\n[2]\n", "a.jsonl:2: holds list, not an object of columns"),
        ("b.jsonl", '{"prompt" "a"}\n' + LINES, r"b.jsonl:1: is not JSON"),
        ("deep.jsonl", '{"a":' * 100_000 + "\n" + LINES, "deep.jsonl:1: is nested too deeply"),
        ("latin.jsonl", '{"prompt": "ä", "completion": "b"}\n'.encode("latin-1"), "latin.jsonl:1: is not UTF-8 text"),
        ("empty.csv", "", "has no rows"),
        ("head.csv", "prompt,completion\n", "has no rows"),
    ],
)
def test_bad_rows_are_named_by_their_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Data().file(write(tmp_path / name, content), None)


def test_numbers_and_dates_of_parquet(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    row = {"a": 7, "b": 1e-05, "c": Decimal("0.10"), "day": datetime.date(2024, 2, 29)}
    file = write(tmp_path / "rows.parquet", parquet([row]))
    template = Template(prompt="{a} {b} {c}", completion=" {a}")
    assert Data().file(file, template) == [Example("7 1e-05 0.10", " 7")]
    with pytest.raises(InputError, match=r"rows.parquet, row 0: its column 'day' is .*, not text or a number"):
        Data().file(file, Template(prompt="{day}", completion=" {a}"))


def test_chats_of_parquet_and_of_json_lines_read_the_same(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Parquet fills fields that some rows lack: they are absent, as in JSON."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": {argument: "x"}}]},
            ],
            "tools": [{"name": name, "parameters": {argument: {"type": "string"}}}],
        }
        for name, argument in (("weather", "city"), ("time", "zone"))
    ]
    lines = Data(tokenizer).file(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))), None)
    assert Data(tokenizer).file(write(tmp_path / "rows.parquet", parquet(rows)), None) == lines
    as_text = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    assert Data(tokenizer).file(write(tmp_path / "text.parquet", parquet(as_text)), None) == lines
    assert '{"city": "x"}' in lines[0].answer and "zone" not in lines[0].prompt + lines[0].answer


def test_names_of_files_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_name("train.v2.jsonl.gz") == ("train.v2", ".jsonl.gz")
    assert split_name("Train.CSV") == ("Train", ".CSV")
    assert split_name("notes.txt.gz") == ("notes.txt.gz", "")
    assert not holds_rows(write(tmp_path / "notes.txt", "text"))
    assert holds_rows(write(tmp_path / "shard-0", parquet(ROWS)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a.csv") == tmp_path / "a.csv"
    assert local_path("~nobody-of-this-name/a.csv") == Path("~nobody-of-this-name/a.csv")


def test_a_home_in_any_path_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.csv", table())
    assert load_examples(DataConfig(task="~/rows.csv"), "train", 0) == EXAMPLES
    task = "name: t\ndata: ~/rows.csv\nmetric: exact\nprompt: '{prompt}'\nanswer: '{completion}'\n"
    write(tmp_path / "task.yaml", task)
    assert load_examples(DataConfig(task="~/task.yaml"), "train", 0) == EXAMPLES
