"""Our batched decoding against a loop without batch, padding, cache or shared prompts, on several architectures."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sqft.evaluation import attention, decoding, reader
from sqft.evaluation.decoding import generate, likelihoods
from sqft.evaluation.reader import common_length

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, max_position_embeddings=128,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"num_key_value_heads": 2},
    "qwen2": SHAPE | {"num_key_value_heads": 2},
    "qwen3": SHAPE | {"num_key_value_heads": 2, "head_dim": 8},
    # A window that the sequences exceed.
    "mistral": SHAPE | {"num_key_value_heads": 2, "sliding_window": 8},
    "phi3": SHAPE | {"num_key_value_heads": 2},
    "gemma2": SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SHAPE | {"alibi": True},
    "mixtral": SHAPE | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that the most likely token is no near tie
    return model.eval()


def sequences(seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """Groups: shared prompts, prompts that part early, and single ones."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(draw.randint(least, most))]

    groups = []
    for _ in range(4):
        prompt = tokens(8, 30)
        groups.append([(prompt, tokens(1, 6)) for _ in range(draw.randint(2, 5))])
    begin, end = tokens(3, 9), tokens(4, 9)
    groups.append([(begin + tokens(1, 3), end) for _ in range(2)])
    groups += [[(tokens(1, 20), tokens(1, 9))] for _ in range(3)]
    return groups


@torch.no_grad()
def naive_likelihood(model: Any, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for place, token in enumerate(answer, len(prompt)):
        total += float(logits[place - 1, token])
        greedy &= int(logits[place - 1].argmax()) == token
    return total, greedy


@torch.no_grad()
def naive_generate(model: Any, prompt: list[int], count: int, end: int) -> list[int]:
    found: list[int] = []
    while len(found) < count and (not found or found[-1] != end):
        found.append(int(model(torch.tensor([prompt + found]), use_cache=False).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("room", [2048, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_likelihoods_equal_those_of_single_forwards(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_TOKENS", room)
    model, groups = tiny(name), sequences(1)
    # One answer that is greedy, so that the flag is seen true as well.
    prompt = groups[0][0][0]
    groups[0][0] = (prompt, naive_generate(model, prompt, 3, -1))
    for batch in (1, 3, 100):
        found = likelihoods(model, groups, batch)
        for group, values in zip(groups, found, strict=True):
            for (begin, answer), value in zip(group, values, strict=True):
                total, greedy = naive_likelihood(model, begin, answer)
                assert value.total == pytest.approx(total, abs=2e-3), (name, batch)
                assert value.greedy == greedy
    assert found[0][0].greedy
    assert not all(value.greedy for values in found for value in values)


@pytest.mark.parametrize("room", [2048, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_a_loop_without_cache(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_TOKENS", room)  # prompts are read in parts, whose caches are joined
    model = tiny(name)
    prompts = [prompt for group in sequences(2) for prompt, _ in group]
    whole = [naive_generate(model, prompt, 12, -1) for prompt in prompts]
    # An end that some reach early and others never: rows leave the batch at different steps.
    end = whole[0][2]
    expected = [naive_generate(model, prompt, 12, end) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1
    seen = []
    for batch in (1, 4, 100):
        seen.clear()
        assert generate(model, prompts, 12, batch, lambda tokens: tokens[-1] == end, seen.append) == expected
        assert sum(seen) == len(prompts)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_all_rows_begin_with_changes_no_answer(name: str) -> None:
    model, begin = tiny(name), list(range(40, 65))
    groups = [[(begin + prompt, answer) for prompt, answer in group] for group in sequences(3)]
    found = likelihoods(model, groups, 4)
    for group, values in zip(groups, found, strict=True):
        for (prompt, answer), value in zip(group, values, strict=True):
            assert value.total == pytest.approx(naive_likelihood(model, prompt, answer)[0], abs=2e-3)
    prompts = [prompt for group in groups for prompt, _ in group]
    end = naive_generate(model, prompts[0], 12, -1)[2]
    expected = [naive_generate(model, prompt, 12, end) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1
    assert generate(model, prompts, 12, 4, lambda tokens: tokens[-1] == end) == expected


@pytest.mark.parametrize("choices", [1, 3])  # of one token: what the prompt predicts judges them
def test_what_all_rows_begin_with_is_read_once(choices: int) -> None:
    model, begin = tiny("llama"), list(range(3, 63))
    read: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    rows = [[(begin + [70 + row] * 4, [80 + choice]) for choice in range(choices)] for row in range(6)]
    likelihoods(model, rows, 100)
    assert sum(read) == 60 + 6 * 4
    read.clear()
    generate(model, [pairs[0][0] for pairs in rows], 1, 4, lambda _: False)
    assert sum(read) == 60 + 6 * 4


def test_the_next_prompts_take_the_places_of_ended_rows() -> None:
    model = tiny("llama")
    prompts = [prompt for seed in (4, 5) for group in sequences(seed) for prompt, _ in group]
    whole = [naive_generate(model, prompt, 24, -1) for prompt in prompts]
    end = whole[0][2]
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in whole]
    steps: list[tuple[int, int]] = []

    def note(_module: Any, _arguments: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] == 1:
            steps.append(tuple(given["attention_mask"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    assert generate(model, prompts, 24, 4, lambda tokens: tokens[-1] == end) == expected
    replaced = len(steps)
    # Four places are busy nearly all the time, and padding that nobody needs is dropped.
    assert sum(rows for rows, _ in steps) < 1.3 * sum(len(tokens) for tokens in expected)
    assert max(width for _, width in steps) <= max(map(len, prompts)) + 24 + 2 * reader._UNUSED
    steps.clear()
    for start in range(0, len(prompts), 4):
        generate(model, prompts[start : start + 4], 24, 4, lambda tokens: tokens[-1] == end)
    assert replaced < len(steps)


@pytest.mark.parametrize(
    ("begins", "parts"),
    [
        ([0, 0, 0, 0], [(0, 4, 0)]),
        ([0, 3, 3, 6], [(0, 1, 0), (1, 3, 3), (3, 4, 6)]),
        ([2, 6, 4, 6], [(0, 1, 2), (1, 3, 4), (3, 4, 6)]),  # a row that begins earlier than the one before it
        ([5], [(0, 1, 5)]),
    ],
)
def test_padding_is_left_out_of_a_step_from_the_row_on_where_all_have_it(
    begins: list[int], parts: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_WORTH_A_CALL", 2)
    mask = torch.tensor([[int(column >= begin) for column in range(8)] for begin in begins])
    with attention.skipping_padding(mask):
        found = attention._SPANS.get()
        assert found is not None
        assert [(rows.start, rows.stop, first) for rows, first in found.parts] == parts
    assert attention._SPANS.get() is None


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_same_without_the_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    prompts = [prompt for group in sequences(6) for prompt, _ in group]
    expected = generate(model, prompts, 12, 100, lambda _: False)
    parts = []
    stock = attention._Spans
    monkeypatch.setattr(attention, "_Spans", lambda columns, found: parts.append(len(found)) or stock(columns, found))
    monkeypatch.setattr(attention, "_WORTH_A_CALL", 1)
    assert generate(model, prompts, 12, 100, lambda _: False) == expected
    assert max(parts) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_equal_logits_the_first_wins_as_with_argmax(dtype: torch.dtype) -> None:
    logits = torch.randn(16, 50_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, columns in enumerate(logits):
        columns[[49_999, 7 + 1000 * row, 20_000 + row]] = 9.0
    assert torch.equal(decoding._likeliest(logits), logits.argmax(dim=-1))


def test_the_common_part_has_no_token_of_an_answer() -> None:
    assert common_length([([5, 6, 7], [8]), ([5, 6, 7], [9, 9])]) == 3
    assert common_length([([5, 6, 7], [8]), ([5, 9, 7], [8])]) == 1
    assert common_length([([5], [8]), ([5], [9])]) == 1


def test_a_shared_prompt_is_read_once() -> None:
    model = tiny("llama")
    prompt = list(range(3, 43))
    read = []
    model.register_forward_pre_hook(lambda _m, _a, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    likelihoods(model, [[(prompt, [50 + i, 60]) for i in range(4)]], 16)
    assert sum(read) == 40 + 4  # the rest of each: the answer's first token, which predicts its second
