from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.data.calibration import perplexity_tokens
from sqft.evaluation import perplexity as module
from sqft.evaluation.perplexity import perplexity
from sqft.model.load import load_model


def test_perplexity_is_that_of_windows_predicted_from_their_own_start(
    tiny_model: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("\n".join(f"row {i} of a text\n" for i in range(30)))
    monkeypatch.setenv("SQFT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(module, "WINDOW", 32)
    model = load_model(tiny_model("llama"))
    tokens = perplexity_tokens("wikitext2", "test", tiny_tokenizer)
    windows = len(tokens) // 32
    losses = []
    for start in range(0, windows * 32, 32):
        with torch.no_grad():
            logits = model(input_ids=tokens[start : start + 32][None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(logits[i, tokens[start + i + 1]]) for i in range(31)) / 31)
    found = perplexity(model, tiny_tokenizer)
    assert found["value"] == pytest.approx(math.exp(sum(losses) / windows), rel=1e-4)
    assert (found["metric"], found["n"], found["window"]) == ("perplexity", windows, 32)
    assert found["stderr"] > 0
    assert perplexity(model, tiny_tokenizer, 2)["value"] == pytest.approx(math.exp(sum(losses[:2]) / 2), rel=1e-4)
