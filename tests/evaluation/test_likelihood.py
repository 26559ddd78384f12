"""The likelihood of right answers against a forward of each row alone, and against training's loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from sqft.adapters.attach import load_model
from sqft.data.encode import encode
from sqft.data.tasks import Example
from sqft.errors import InputError
from sqft.evaluation.likelihood import answer_nll, answer_pairs, log_likelihoods, ratio_error
from sqft.training.batches import label_examples

EXAMPLES = [
    Example(f"Question: {a} + {b}?\nAnswer:", f" {a * b} and {a}"[: 3 + a]) for a in range(1, 4) for b in (3, 9)
]


def nll(model: Any, tokenizer: Any, examples: list[Example], batch: int) -> dict[str, Any]:
    pairs = answer_pairs(model, tokenizer, examples)
    return answer_nll(pairs, log_likelihoods(model, pairs, batch))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])  # positions passed in, absolute ones, a recurrent state
def test_it_is_the_loss_of_training_over_the_same_tokens(
    arch: str, tiny_model: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    model = load_model(tiny_model(arch))
    found = nll(model, tiny_tokenizer, EXAMPLES, 4)
    encoded = [encode(tiny_tokenizer, example.prompt, example.answer) for example in EXAMPLES]
    rows = label_examples(encoded, tiny_tokenizer.eos_token_id, length=128, model_length=None, completion_only=True)
    sums, tokens = [], []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        sums.append(float(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")))
        tokens.append(int((labels != -100).sum()))
    assert found["tokens"] == tokens
    assert found["rows"] == pytest.approx(sums, abs=2e-4)
    assert found["value"] == pytest.approx(sum(sums) / sum(tokens), abs=1e-5)
    assert (found["metric"], found["n"]) == ("nll", len(EXAMPLES))


def test_of_rows_of_one_length_the_error_is_that_of_a_mean() -> None:
    nats = [1.0, 2.0, 4.0]
    value = sum(nats) / 6
    assert ratio_error([v - value * 2 for v in nats], 6) == pytest.approx(statistics.stdev(nats) / 2 / math.sqrt(3))
    assert ratio_error([0.0], 2) is None


def test_a_prompt_beyond_the_context_loses_its_beginning(tiny_model: Callable[..., Path], tiny_tokenizer: Any) -> None:
    model = load_model(tiny_model("llama"))
    most = model.config.max_position_embeddings
    prompt = "0123456789" * (most // 10 + 3)
    answer = " yes"
    kept = most - len(answer)  # a token a byte: the prompt, the answer and all but the end token are as many as fit
    found = nll(model, tiny_tokenizer, [Example(prompt, answer)], 1)
    assert found["rows"] == nll(model, tiny_tokenizer, [Example(prompt[-kept:], answer)], 1)["rows"]
    with pytest.raises(InputError, match="leaves no room for its prompt"):
        nll(model, tiny_tokenizer, [Example("a", "b" * most)], 1)
