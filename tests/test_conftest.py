"""The tiny models are what tests take them for: whole on disk, all random, different by architecture."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, VOCABULARY


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiny_model_loads_and_every_parameter_is_random(arch, tiny_model):
    folder = tiny_model(arch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.config.model_type == arch
    assert model.dtype == torch.float32
    for name, weight in model.named_parameters():
        assert weight.float().std() > 0.01, name
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert sum(p.numel() for p in model.parameters()) < 200_000


def test_bfloat16_is_stored_as_such(tiny_model):
    folder = tiny_model("llama", "bfloat16")
    assert folder != tiny_model("llama")
    assert folder == tiny_model("llama", torch.bfloat16)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}


def test_experts_are_fused_in_memory_and_apart_on_disk(tiny_model):
    folder = tiny_model("mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    fused = {name: p.shape for name, p in model.named_parameters() if p.dim() == 3}
    assert len(fused) == 4, "two layers, gate_up and down"
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        assert all(len(tensors.get_slice(name).get_shape()) < 3 for name in names)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


def test_tokenizer_round_trips_any_text(tiny_tokenizer):
    text = "12 + 30 = 42 Köln\n"
    tokens = tiny_tokenizer(text).input_ids
    assert len(tokens) == len(text.encode())
    assert tiny_tokenizer.decode(tokens) == text
    assert tiny_tokenizer.eos_token_id != tiny_tokenizer.pad_token_id
    chat = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>hi<|end|><|assistant|>"
    assert max(tiny_tokenizer(chat).input_ids) < VOCABULARY
