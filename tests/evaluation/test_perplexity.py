from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.adapters.attach import load_model
from sqft.data.calibration import perplexity_tokens
from sqft.evaluation import perplexity as module
from sqft.evaluation.perplexity import perplexity, windows


def test_perplexity_is_that_of_windows_predicted_from_their_own_start(
    tiny_model: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("\n".join(f"row {i} of a text\n" for i in range(30)))
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(module, "WINDOW", 32)
    model = load_model(tiny_model("llama"))
    tokens = perplexity_tokens("wikitext2", "test", tiny_tokenizer)
    count = len(tokens) // 32
    losses = []
    for start in range(0, count * 32, 32):
        with torch.no_grad():
            logits = model(input_ids=tokens[start : start + 32][None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(logits[i, tokens[start + i + 1]]) for i in range(31)) / 31)
    found = perplexity(model, tiny_tokenizer)
    assert found["value"] == pytest.approx(math.exp(sum(losses) / count), rel=1e-4)
    assert (found["metric"], found["n"], found["window"]) == ("perplexity", count, 32)
    assert found["stderr"] > 0
    assert perplexity(model, tiny_tokenizer, 2)["value"] == pytest.approx(math.exp(sum(losses[:2]) / 2), rel=1e-4)


def test_windows_begin_as_the_models_texts_do(
    tiny_model: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of Gemma's shape begins each window; one that adds nothing has the windows that it always had."""
    from transformers import AutoConfig

    from data.test_calibration import gemma_shaped

    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("\n".join(f"row {i} of a text\n" for i in range(30)))
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(module, "WINDOW", 32)
    config = AutoConfig.from_pretrained(tiny_model("gemma"))
    text = perplexity_tokens("wikitext2", "test", tiny_tokenizer)
    tokenizer = gemma_shaped()
    assert torch.equal(perplexity_tokens("wikitext2", "test", tokenizer), text)  # no token of the tokenizer's own

    plain = windows(config, tiny_tokenizer)
    assert torch.equal(plain, text[: len(text) // 32 * 32].view(-1, 32))

    begun = windows(config, tokenizer)
    assert begun.shape == (len(text) // 31, 32)
    assert (begun[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(begun[:, 1:], text[: len(text) // 31 * 31].view(-1, 31))  # 31 tokens of text a window

    # The first token of text is predicted from the beginning: as many predictions as the window has text.
    model = load_model(tiny_model("gemma"))
    losses = []
    for row in begun:
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(logits[i, row[i + 1]]) for i in range(31)) / 31)
    found = perplexity(model, tokenizer)
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert (found["n"], found["window"]) == (len(begun), 32)
