"""Chats show what their rows have, or are refused by name; a date is that of the data and never the clock's."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from sqft.data import chat
from sqft.data.chat import as_chat, chat_example, uses_clock, with_date
from sqft.data.load import Data, load_examples
from sqft.data.tasks import BUILTIN, Example
from sqft.errors import InputError
from sqft.recipe import DataConfig, Template

END = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = "<|{{ m.role }}|>{{ m.content }}<|end|>"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + END
TOOLS = "{% if tools %}<|pad|>{{ tools | tojson }}{% endif %}" + PLAIN
DOCUMENTS = "{% for d in documents or [] %}<|pad|>{{ d.text }}{% endfor %}" + PLAIN
THINKING = "{% if enable_thinking %}/think{% endif %}" + PLAIN
CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}<|end|>{% endfor %}" + END
)
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>{% endfor %}" + END
)
DATED = "<|pad|>{{ strftime_now('%d %b %Y %H:%M') }}<|end|>" + PLAIN
# Llama-3's way, and transformers' mark of what the model wrote.
GUARDED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%Y-%m-%d') %}{% else %}{% set day = 'none' %}"
    "{% endif %}{{ day }}{% for m in messages %}{% generation %}" + TURN + "{% endgeneration %}{% endfor %}" + END
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "No."},
]
IN_PARTS = [
    {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}, {"type": "text", "text": "!"}]}
    for turn in CHAT
]


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    def with_template(template: Any) -> Any:
        found = copy.deepcopy(tiny_tokenizer)
        found.chat_template = template
        return found

    return with_template


def read(row: dict[str, Any], tokenizer: Any) -> Example:
    return chat_example(row, tokenizer, None)


@pytest.mark.parametrize(
    ("template", "row", "shown"),
    [
        (TOOLS, {"tools": [TOOL]}, '"name": "weather"'),
        (TOOLS, {"tools": json.dumps([TOOL])}, '"name": "weather"'),
        (DOCUMENTS, {"documents": [{"title": "t", "text": "It rains."}]}, "It rains."),
        (THINKING, {"enable_thinking": True}, "/think"),
        (THINKING, {"chat_template_kwargs": {"enable_thinking": True}}, "/think"),
        ({"default": PLAIN, "tool_use": TOOLS}, {"tools": [TOOL]}, '"name": "weather"'),
    ],
    ids=["tools", "tools as text", "documents", "a variable of its own", "further variables", "named templates"],
)
def test_the_template_is_shown_what_the_row_has(tokenizer: Any, template: Any, row: Any, shown: str) -> None:
    example = read({"messages": CHAT, **row}, tokenizer(template))
    plain = read({"messages": CHAT}, tokenizer(template))
    assert shown in example.prompt
    assert example.prompt.endswith("<|user|>hi<|end|><|assistant|>") and example.answer == "yo" == plain.answer
    assert shown not in plain.prompt


@pytest.mark.parametrize(
    "row", [{"tools": None}, {"tools": []}, {"documents": []}, {"id": 7, "source": "x", "range": 3, "eos_token": "y"}]
)
def test_what_says_nothing_to_a_template_changes_nothing(tokenizer: Any, row: Any) -> None:
    with_range = tokenizer("{% for i in range(1) %}{{ eos_token }}{% endfor %}" + PLAIN)
    assert read({"messages": CHAT, **row}, with_range) == read({"messages": CHAT}, with_range)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (PLAIN, {"tools": [TOOL]}, r"has tools, which .* does not show \(its variables are none\); use a model"),
        (PLAIN, {"documents": [{"text": "a"}]}, "has documents, which the tokenizer's chat template does not show"),
        (PLAIN, {"system": "Be kind."}, "has system, which the tokenizer's chat template does not show"),
        (PLAIN, {"chat_template_kwargs": {"enable_thinking": True}}, "has enable_thinking, which"),
        ("{% if tools and 1 > 2 %}{{ tools }}{% endif %}" + PLAIN, {"tools": [TOOL]}, "has tools, .* in this chat"),
        (TOOLS, {"tools": "weather"}, "its tools are not a list of objects, nor the JSON text of one"),
        (TOOLS, {"tools": ["weather"]}, "its tools are not a list of objects"),
        (TOOLS, {"chat_template_kwargs": 3}, "its chat_template_kwargs are int"),
        (PLAIN, {"messages": CALLING}, r"turn 2 \(assistant\) has tool_calls, which .* does not show"),
        (
            PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}"),
            {"messages": CALLING},
            r"turn 2 \(assistant\) has content null, which .* writes as None; give an empty text",
        ),
        (
            PLAIN.replace("{{ m.content }}", "{{ m.content + '' }}{{ m.tool_calls }}"),
            {"messages": CALLING},
            "refuses the turns user, assistant, tool, assistant .*; one has content null: give an empty text",
        ),
        (PLAIN, {"messages": IN_PARTS}, r"turn 1 \(user\) has its text in parts, .*; join them"),
        (PLAIN.replace("m.content", "m.content|tojson"), {"messages": IN_PARTS}, r"turn 1 .* has its text in parts"),
        (PARTS, {"messages": CHAT}, r"turn 1 \(user\) has a text, which .* does not show; it may want it in parts"),
        (
            PARTS,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]},
            r"turn 1 \(user\) has parts of type image; only texts are read",
        ),
        (
            PLAIN,
            {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}]},
            r"turn 2 \(assistant\) has reasoning_content, which",
        ),
        (
            PLAIN,
            {"messages": [{"role": "user", "content": None}, CHAT[1]]},
            r"turn 1 \(user\) has neither content nor calls",
        ),
        (PLAIN, {"messages": [{"role": "user", "content": 3}, CHAT[1]]}, r"turn 1 \(user\) has int"),
    ],
)
def test_what_the_template_does_not_show_is_refused(tokenizer: Any, template: str, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({"messages": CHAT, **row}, tokenizer(template))


def test_calls_of_tools_and_texts_in_parts_that_the_template_shows(tokenizer: Any) -> None:
    called = json.dumps(CALL)
    whole = read({"messages": CALLING}, tokenizer(CALLS))
    assert whole.prompt == f"<|user|>rain?<|end|><|assistant|>{called}<|end|><|tool|>no<|end|><|assistant|>"
    assert read({"messages": CALLING[:2]}, tokenizer(CALLS)).answer == called
    assert read({"messages": json.dumps(CALLING)}, tokenizer(CALLS)) == whole
    parts = read({"messages": IN_PARTS}, tokenizer(PARTS))
    assert (parts.prompt, parts.answer) == ("<|user|>hi!<|end|><|assistant|>", "yo!")


def test_thinking_that_a_template_takes_out_of_earlier_turns_is_no_loss(tokenizer: Any) -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}")
    turns = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>yo"}, *CHAT]
    example = read({"messages": turns}, tokenizer(template))
    assert example.prompt == "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>hi<|end|><|assistant|>"


def test_tools_beside_a_prompt_are_refused_where_the_chat_template_asks(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": " b", "tools": [TOOL]}) + "\n")
    # As text the prompt is what it is; whoever wrote it has put its tools in.
    assert Data(tokenizer(TOOLS)).file(file, None) == [Example("a", " b")]
    with pytest.raises(InputError, match=r"rows.jsonl:1: has tools, which a prompt that is put into .*give messages"):
        load_examples(DataConfig(task=str(file), chat_template=True), "train", 0, tokenizer(TOOLS))


def test_a_question_that_the_template_does_not_show_is_refused(tokenizer: Any) -> None:
    task = BUILTIN["svamp"]
    assert as_chat(Example("2+2?", " 4"), tokenizer(PLAIN), task).prompt == "<|user|>2+2?<|end|><|assistant|>"
    with pytest.raises(InputError, match=r"data.chat_template: .*does not show a turn's text.*; set it to false"):
        as_chat(Example("2+2?", " 4"), tokenizer(PARTS), task)


# ---- dates ----


@pytest.mark.parametrize(
    ("template", "asks"),
    [(PLAIN, False), (DATED, True), (GUARDED, True), ({"default": PLAIN, "dated": DATED}, True), (None, False),
     ("{{ 'strftime_now' }}" + PLAIN, False), ("{% broken", False)],
)  # fmt: skip
def test_whether_a_template_asks_for_the_date(tokenizer: Any, template: Any, asks: bool) -> None:
    assert uses_clock(tokenizer(template)) is asks


def test_the_date_is_that_of_the_data(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    config = DataConfig(task=str(file), date="2024-02-29T10:30:00")
    (example,) = load_examples(config, "train", 0, tokenizer(DATED))
    assert example.prompt.startswith("<|pad|>29 Feb 2024 10:30<|end|>")
    (guarded,) = load_examples(config, "train", 0, tokenizer(GUARDED))
    assert guarded.prompt.startswith("2024-02-29")
    question = as_chat(Example("2+2?", " 4"), tokenizer(DATED), BUILTIN["svamp"], "2024-02-29")
    assert question.prompt.startswith("<|pad|>29 Feb 2024 00:00<|end|>")


def test_without_a_date_two_calls_are_told_the_same_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    days = iter(range(1, 30))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2030, 1, next(days))

    monkeypatch.setattr(chat, "datetime", Clock)
    chat._began.cache_clear()
    try:
        first = read({"messages": CHAT}, tokenizer(DATED))
        assert first.prompt.startswith("<|pad|>01 Jan 2030")
        assert read({"messages": CHAT}, tokenizer(DATED)) == first
    finally:
        chat._began.cache_clear()


def test_a_date_is_set_only_where_it_says_something(tokenizer: Any) -> None:
    moment = datetime(2024, 2, 29, 10, 30, 0, 5)
    chats = DataConfig(task="chats.jsonl")
    assert with_date(chats, tokenizer(DATED), moment).date == "2024-02-29T10:30:00"
    assert with_date(DataConfig(task="gsm8k", chat_template=True), tokenizer(DATED), moment).date is not None
    for data in (
        chats.model_copy(update={"date": "2020-01-01"}),
        DataConfig(task="gsm8k"),
        DataConfig(task="math"),
        DataConfig(task="gym:chain_sum"),
        DataConfig(task="my.yaml"),
        DataConfig(task="a.jsonl", template=Template(prompt="{a}", completion="{b}")),
    ):
        assert with_date(data, tokenizer(DATED), moment) == data
    assert with_date(chats, tokenizer(PLAIN), moment) == chats
