from __future__ import annotations

import gzip
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.data.calibration import calibration_tokens, perplexity_tokens
from sqft.errors import InputError
from sqft.recipe import CalibrationConfig, DataConfig


@pytest.fixture
def own_data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"prompt": f"row {i:03d}", "completion": f" is {i:03d}"} for i in range(50)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(task=str(folder))


def windows(config: CalibrationConfig, data: DataConfig | None, tokenizer: Any, seed: int = 0) -> torch.Tensor:
    tokens = calibration_tokens(config, data, tokenizer, seed)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (config.samples, config.length)
    return tokens


def test_task_rows_are_shuffled_prompts_and_answers_with_the_end_token(own_data: Any, tiny_tokenizer: Any) -> None:
    config = CalibrationConfig(samples=4, length=45)
    tokens = windows(config, own_data, tiny_tokenizer)
    text = tiny_tokenizer.decode(tokens.flatten().tolist())
    rows = text.split("<|end|>")[:-1]
    assert all(row == f"row {row[4:7]} is {row[4:7]}" for row in rows)
    assert len(rows) == len(set(rows)) == 4 * 45 // 15
    assert rows != sorted(rows)


def test_windows_depend_on_the_seed_alone(own_data: Any, tiny_tokenizer: Any) -> None:
    config = CalibrationConfig(samples=4, length=45)
    first = windows(config, own_data, tiny_tokenizer, seed=1)
    assert torch.equal(first, windows(config, own_data, tiny_tokenizer, seed=1))
    assert not torch.equal(first, windows(config, own_data, tiny_tokenizer, seed=2))


def test_text_windows_do_not_overlap_and_reach_everywhere(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i:05d}" for i in range(200)))  # 1,000 tokens, each five of them unique
    config = CalibrationConfig(data=str(file), samples=9, length=100)
    texts = [tiny_tokenizer.decode(row) for row in windows(config, None, tiny_tokenizer)]
    whole = file.read_text()
    starts = sorted(whole.index(text) for text in texts)
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    chosen = {whole.index(tiny_tokenizer.decode(windows(config, None, tiny_tokenizer, s)[0])) for s in range(20)}
    assert len(chosen) > 10


def test_too_short_a_text_is_repeated_and_said_to_be(
    own_data: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sqft"):
        windows(CalibrationConfig(samples=10, length=150), own_data, tiny_tokenizer)
    assert "task has 750 tokens, fewer than 10 samples of 150; its text is repeated 2.0 times" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "sqft"):
        windows(CalibrationConfig(samples=5, length=150), own_data, tiny_tokenizer)
    assert "repeated" not in caplog.text


def test_jsonl_of_texts_and_of_prompts(tmp_path: Path, tiny_tokenizer: Any) -> None:
    texts, prompts = tmp_path / "texts.jsonl", tmp_path / "prompts.jsonl"
    texts.write_text('{"text": "abcd"}\n{"text": "efgh"}\n')
    prompts.write_text('{"prompt": "ab", "completion": "cd"}\n{"prompt": "ef", "completion": "gh"}\n')
    for file in (texts, prompts):
        tokens = windows(CalibrationConfig(data=str(file), samples=1, length=10), None, tiny_tokenizer)
        assert sorted(tiny_tokenizer.decode(tokens[0]).split("<|end|>")) == ["", "abcd", "efgh"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "has no tokens"),
        ("empty.jsonl", "", "has no rows"),
        ("blank.jsonl", '{"text": ""}\n', "has no tokens"),
        ("bad.jsonl", '{"text": "a"}\n{"test": "b"}\n', r"bad.jsonl:2: has no column 'text'; its columns are test"),
        ("odd.jsonl", '{"text": ["a"]}\n', r"odd.jsonl:1: its text is list"),
    ],
)
def test_unusable_text_is_refused(tmp_path: Path, tiny_tokenizer: Any, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        calibration_tokens(CalibrationConfig(data=str(tmp_path / name)), None, tiny_tokenizer, 0)


def test_unknown_sources_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="'c4': is neither 'task' nor 'wikitext2' nor a file here"):
        calibration_tokens(CalibrationConfig(data="c4"), None, tiny_tokenizer, 0)
    with pytest.raises(InputError, match="'task': there is no task"):
        calibration_tokens(CalibrationConfig(), None, tiny_tokenizer, 0)
    with pytest.raises(InputError, match="perplexity text 'c4': known is wikitext2"):
        perplexity_tokens("c4", "test", tiny_tokenizer)


def test_wikitext_from_a_folder_and_from_the_hub_is_one_text(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text(" \n = Title = \n \n Some text . \n")
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    local = perplexity_tokens("wikitext2", "test", tiny_tokenizer)
    assert tiny_tokenizer.decode(local) == "\n\n = Title = \n\n\n\n\n Some text . \n"
    hub = [{"text": t} for t in ("", " = Title = \n", "", " Some text . \n")]
    asked: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, split: asked.append((*args, split)) or hub)
    (tmp_path / "wikitext2" / "test.txt").unlink()
    assert torch.equal(perplexity_tokens("wikitext2", "test", tiny_tokenizer), local)
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1", "test")]


def test_wikitext_that_is_nowhere_says_what_was_looked_for(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_args: Any, **_options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        InputError, match=r"no validation part: .*wikitext2/valid.txt .* Salesforce/wikitext .no network"
    ):
        calibration_tokens(CalibrationConfig(data="wikitext2"), None, tiny_tokenizer, 0)


def test_the_public_wikitext(data_dir: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQFT_DATA_DIR", str(data_dir))
    tokens = windows(CalibrationConfig(data="wikitext2", samples=8, length=64), None, tiny_tokenizer)
    assert len({tuple(row.tolist()) for row in tokens}) == 8
    assert len(perplexity_tokens("wikitext2", "test", tiny_tokenizer)) > 1_000_000


# ---- windows of a tokenizer that begins its texts ----


def gemma_shaped() -> Any:
    """A byte-level tokenizer that begins every text, as Gemma's does, and ends it, as one with add_eos_token does."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from conftest import build_tokenizer

    tokenizer = build_tokenizer().backend_tokenizer
    used = [(token, tokenizer.token_to_id(token)) for token in ("<|user|>", "<|end|>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|user|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def test_every_window_of_text_begins_as_texts_do(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i:05d}" for i in range(200)))
    config = CalibrationConfig(data=str(file), samples=9, length=100)
    tokenizer = gemma_shaped()
    tokens = windows(config, None, tokenizer)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    # The rest is text: 99 of its tokens a window, none of them special, none in two windows.
    texts = [tokenizer.decode(row[1:]) for row in tokens]
    starts = sorted(file.read_text().index(text) for text in texts)
    assert {len(text) for text in texts} == {99}
    assert all(b - a >= 99 for a, b in itertools.pairwise(starts))
    # A tokenizer that adds nothing has windows of text alone.
    plain = windows(config, None, tiny_tokenizer)
    assert {len(tiny_tokenizer.decode(row)) for row in plain} == {100}


def test_windows_of_rows_double_neither_beginning_nor_end(own_data: Any) -> None:
    tokenizer = gemma_shaped()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for length in (16, 45):  # 16: every window is one row with its beginning and end
        tokens = windows(CalibrationConfig(samples=3, length=length), own_data, tokenizer)
        for row in tokens.tolist():
            assert row[0] == bos
            for first, second in itertools.pairwise(row):
                assert first != second or first not in (bos, eos)
                assert first != eos or second == bos


def test_a_row_that_brings_its_end_is_ended_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "abcd<|end|>"}\n{"text": "efgh"}\n')
    tokens = windows(CalibrationConfig(data=str(file), samples=1, length=10), None, tiny_tokenizer)
    assert sorted(tiny_tokenizer.decode(tokens[0]).split("<|end|>")) == ["", "abcd", "efgh"]


def test_windows_without_room_for_text_are_refused(own_data: Any) -> None:
    with pytest.raises(InputError, match=r"calibration.length is 1, which the tokenizer's 1 beginning tokens fill"):
        calibration_tokens(CalibrationConfig(samples=1, length=1), own_data, gemma_shaped(), 0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.json", b'[{"text": "abcd"}, {"text": "efgh"}]'),
        ("texts.csv", b"text\nabcd\nefgh\n"),
        ("texts.jsonl.gz", gzip.compress(b'{"text": "abcd"}\n{"text": "efgh"}\n', mtime=0)),
        ("prompts.csv", b"prompt,completion\nab,cd\nef,gh\n"),
    ],
)
def test_rows_of_other_files(tmp_path: Path, tiny_tokenizer: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    tokens = windows(CalibrationConfig(data=str(tmp_path / name), samples=1, length=10), None, tiny_tokenizer)
    assert sorted(tiny_tokenizer.decode(tokens[0]).split("<|end|>")) == ["", "abcd", "efgh"]


@pytest.mark.parametrize("content", ["abcdefghij".encode("utf-16"), gzip.compress(b"abcdefghij", mtime=0)])
def test_text_of_other_encodings(
    tmp_path: Path, tiny_tokenizer: Any, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    tokens = windows(CalibrationConfig(data="~/text.txt", samples=1, length=10), None, tiny_tokenizer)
    assert tiny_tokenizer.decode(tokens[0]) == "abcdefghij"
    (tmp_path / "text.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(InputError, match=r"text.txt: cannot be read as UTF-8 text \(byte 0\)"):
        calibration_tokens(CalibrationConfig(data="~/text.txt"), None, tiny_tokenizer, 0)


def test_half_a_character_is_refused_wherever_it_stands(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "abcd"}\n' * 50 + '{"text": "a \\ud83d"}\n')
    config = CalibrationConfig(data=str(file), samples=1, length=4)
    for seed in range(3):
        with pytest.raises(InputError, match=r"texts.jsonl:51: its text has half a character \(U\+D83D, character 3\)"):
            calibration_tokens(config, None, tiny_tokenizer, seed)
