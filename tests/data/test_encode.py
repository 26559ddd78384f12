from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sqft.data.encode import encode

TEXTS = ["Question: What is ice?\nAnswer: water", "Answer: yes", "Answer: no\n\nwater and ice", "\n\n\nhello there"] * 5


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """Byte-level BPE with merges, as GPT-2, Llama-3 and Qwen have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<e>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A tokenizer that puts a blank before any text and a beginning token before that, as Llama-2 does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<u>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<u>", "<s>", "</s>"], show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<u>")


def test_byte_level_answers_are_tokenised_as_if_alone(byte_level: Any) -> None:
    prompt, answer = "Question: What is ice?\nAnswer:", " water and ice"
    alone = byte_level(answer, add_special_tokens=False)["input_ids"]
    assert encode(byte_level, prompt, answer) == (byte_level(prompt)["input_ids"], alone)
    assert len(alone) < len(answer)


def test_the_end_token_as_text_is_the_end_token(byte_level: Any) -> None:
    prompt, answer = "Answer:", " yes"
    without = encode(byte_level, prompt, answer)
    assert encode(byte_level, prompt, answer + "<e>") == (without[0], [*without[1], byte_level.eos_token_id])


def test_a_token_over_the_boundary_does_not_eat_the_prompt(byte_level: Any) -> None:
    prompt, answer = "hello\n", "\n\nhello"
    joint = byte_level(prompt + answer)["input_ids"]
    ids = byte_level(prompt)["input_ids"]
    assert joint[: len(ids)] != ids  # the two line ends merge
    assert encode(byte_level, prompt, answer) == (ids, byte_level(answer)["input_ids"])


def test_sentencepiece_answers_get_no_second_blank(sentencepiece: Any) -> None:
    prompt, answer = "Answer:", " water"
    prompt_ids, answer_ids = encode(sentencepiece, prompt, answer)
    assert prompt_ids[0] == sentencepiece.bos_token_id
    assert prompt_ids + answer_ids == sentencepiece(prompt + answer)["input_ids"]
    assert answer_ids != sentencepiece(answer, add_special_tokens=False)["input_ids"]


def test_a_beginning_token_in_the_text_is_not_doubled(sentencepiece: Any) -> None:
    prompt_ids, _ = encode(sentencepiece, "<s>Answer:", " yes")
    assert prompt_ids.count(sentencepiece.bos_token_id) == 1
