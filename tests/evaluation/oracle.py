"""A model that answers as it is told: a tiny Llama, trained until its greedy answers are exactly those given."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sqft.data.encode import encode


def answering_model(tokenizer: Any, pairs: list[tuple[str, str]]) -> Any:
    """Return a tiny model whose greedy continuation of each prompt is its answer and the end token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    encoded = sorted((encode(tokenizer, prompt, answer) for prompt, answer in pairs), key=lambda pair: len(pair[0]))
    # Long prompts apart: padding all to the longest would quadruple the time.
    batches = [_batch(tokenizer, part) for part in (encoded[:-3], encoded[-3:]) if part]
    tokens = sum(int((labels != -100).sum()) for _, labels in batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        total, exact = 0.0, True
        for ids, labels in batches:
            output = model(input_ids=ids)
            told = labels[:, 1:] != -100
            loss = functional.cross_entropy(output.logits[:, :-1][told], labels[:, 1:][told], reduction="sum") / tokens
            loss.backward()
            total += loss.item()
            exact = exact and torch.equal(output.logits[:, :-1].argmax(-1)[told], labels[:, 1:][told])
        # Well past the first exact step, so that batching and padding cannot tip an answer.
        if exact and total < 0.04:
            return model.eval()
        optimizer.step()
    raise AssertionError(f"the oracle has not learned its answers (loss {total:.3f})")


def _batch(tokenizer: Any, encoded: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in encoded) + 1
    ids = torch.full((len(encoded), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(encoded):
        whole = [*prompt, *answer, tokenizer.eos_token_id]
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
    return ids, labels
