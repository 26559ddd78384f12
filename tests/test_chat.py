"""`sqft chat` prints a model's greedy answers, in a template or raw, and goes on after what it cannot answer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from evaluation.oracle import answering_model
from sqft import cli
from sqft.chat import Chat
from sqft.errors import InputError


def turns(tokenizer: Any, *said: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    said = [
        ("say cat:", " cat"),
        (turns(tiny_tokenizer, "hi"), "hello"),
        (turns(tiny_tokenizer, "hi", "hello", "and?"), "no"),
    ]
    folder = tmp_path_factory.mktemp("talker")
    answering_model(tiny_tokenizer, said).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_one_prompt_is_answered_raw_or_in_the_template(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chat", str(model), "--raw", "--prompt", "say cat:"]) == 0
    assert capsys.readouterr().out == " cat\n"
    assert cli.run(["chat", str(model), "--prompt", "hi"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_a_conversation_remembers_and_outlives_a_prompt_it_cannot_answer(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n" + "x" * 600 + "\nand?\n"))
    assert cli.run(["chat", str(model)]) == 0
    out, said = capsys.readouterr()
    assert [line.removeprefix("> ") for line in out.replace("> ", "\n").split("\n") if line] == ["hello", "no"]
    assert "the prompt is empty" in said
    assert "the model's context is 512" in said


def test_pieces_make_up_the_answer_and_its_length_is_bounded(model: Path) -> None:
    pieces: list[str] = []
    text, speed = Chat(model, raw=True, max_tokens=2).answer("say cat:", pieces.append)
    assert ("".join(pieces), text) == (" c", " c")
    assert speed > 0
    with pytest.raises(InputError, match="nowhere"):
        Chat(model / "nowhere")
