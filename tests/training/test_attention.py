"""Attention example by example against stock sdpa over whole packed rows, on several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.adapters.attach import load_model
from sqft.training import attention as example_attention
from sqft.training.attention import attend_by_example, attention_by_example, example_lengths
from sqft.training.batches import IGNORED, collate, pack_rows
from sqft.training.loss import answer_loss

LENGTHS = (5, 40, 17, 3, 29, 11, 23)


def packed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (length,), generator=generator).tolist() for length in LENGTHS]
    return collate(pack_rows([{"input_ids": i, "labels": [IGNORED, *i[1:]]} for i in ids], 64, packing=True), 0)


def losses_and_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = answer_loss(model, inputs)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_stock_sdpa(
    name: str, checkpointing: bool, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model(name), attention="sdpa").float().train()
    for module in model.modules():
        for name_of_p in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name_of_p, None), float):
                setattr(module, name_of_p, 0.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = packed()
    wanted = losses_and_gradients(model, inputs)
    seen: list[int] = []
    stock = example_attention.sdpa_attention_forward

    def watched(module: Any, query: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(query.shape[2])
        return stock(module, query, *args, **options)

    monkeypatch.setattr(example_attention, "sdpa_attention_forward", watched)
    attend_by_example(model)
    found = losses_and_gradients(model, inputs)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert set(LENGTHS) <= set(seen), "rows were not taken apart"
    assert max(seen) < inputs["input_ids"].shape[1]


def test_where_examples_end_is_read_off_the_mask() -> None:
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert example_lengths(causal) == [9]
    examples = torch.block_diag(*(torch.ones(n, n) for n in (2, 1, 6))).bool() & causal
    assert example_lengths(examples) == [2, 1, 6]
    window = torch.ones(9, 9, dtype=torch.bool).triu(-2)
    assert example_lengths(examples & window) == [2, 1, 6], "a sliding window ends no example"


def test_a_row_of_one_example_is_one_product() -> None:
    query, key, value = (torch.randn(2, 3, 9, 4) for _ in range(3))
    module = torch.nn.Module()
    module.is_causal = True
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    without_mask, _ = attention_by_example(module, query, key, value, None)
    with_mask, _ = attention_by_example(module, query, key, value, causal)
    torch.testing.assert_close(with_mask, without_mask)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_a_model_that_takes_others_for_sdpa_gets_another(
    attention: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model("llama"), attention=attention)
    # Falcon, among others, asks for sdpa by name.
    monkeypatch.setattr(model, "_supports_attention_backend", attention != "sdpa")
    attend_by_example(model)
    assert model.config._attn_implementation == attention
