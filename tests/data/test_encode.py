from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import build_tokenizer
from sqft.data.encode import beginning, check_vocabulary, encode, encode_prompt, ended
from sqft.errors import InputError

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


# ---- tokens that a tokenizer adds around a text ----


def framed(single: str, bos: str = "<s>", eos: str = "</s>") -> Any:
    """A byte-level tokenizer that puts special tokens around every text."""
    tokenizer = build_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(["<s>", "</s>"])
    used = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>", "<|user|>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<|pad|>")


FRAMES = {
    "<s> $A </s>": ["<s>"],
    "$A </s>": [],
    "<s> $A": ["<s>"],
    "$A": [],
    "<|user|> <s> $A </s>": ["<|user|>", "<s>"],
    "</s> $A </s>": ["</s>"],
}


@pytest.mark.parametrize("frame", FRAMES)
def test_nothing_stands_between_prompt_and_answer_or_after_it(frame: str) -> None:
    tokenizer = framed(frame)
    first = tokenizer.convert_tokens_to_ids(FRAMES[frame])
    assert beginning(tokenizer) == first
    prompt, answer = encode(tokenizer, "2+2?", " 4")
    plain = tokenizer("2+2? 4", add_special_tokens=False)["input_ids"]
    assert prompt + answer == first + plain
    assert encode_prompt(tokenizer, "2+2?") == prompt == first + plain[:4]
    assert encode(tokenizer, "2+2?", " 4</s>")[1] == [*answer, tokenizer.eos_token_id]


def test_tokens_where_one_is_beginning_and_end() -> None:
    tokenizer = framed("</s> $A", bos="</s>")  # as OPT's
    ids = encode_prompt(tokenizer, "a")
    assert ids == [tokenizer.eos_token_id, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    tokenizer = framed("$A </s>", bos="</s>")
    assert encode_prompt(tokenizer, "a") == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_a_beginning_of_several_tokens_in_the_text_is_not_doubled() -> None:
    tokenizer = framed("<|user|> <s> $A", bos="<|user|>")
    assert encode_prompt(tokenizer, "<|user|><s>hi") == encode_prompt(tokenizer, "hi")


def test_training_ends_such_an_answer_once() -> None:
    from sqft.training.batches import label_examples

    tokenizer = framed("<s> $A </s>")
    pairs = [encode(tokenizer, "2+2?", answer) for answer in (" 4", " 4</s>")]
    rows = label_examples(pairs, tokenizer.eos_token_id, length=16, model_length=None, completion_only=True)
    assert rows[0] == rows[1]
    assert rows[0]["input_ids"].count(tokenizer.eos_token_id) == 1
    assert rows[0]["input_ids"][-1] == rows[0]["labels"][-1] == tokenizer.eos_token_id


def test_a_text_is_ended_once_and_only_where_there_is_an_end(byte_level: Any) -> None:
    end = byte_level.eos_token_id
    assert ended(byte_level, [5]) == ended(byte_level, [5, end]) == [5, end]
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    assert ended(endless, [5]) == [5]


def test_tokens_beyond_the_embedding_are_refused() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("ab<|end|>ab<|assistant|>")["input_ids"]
    check_vocabulary([*ids, -100], 260, "data own")
    with pytest.raises(InputError) as raised:
        check_vocabulary(ids, 257, "data own", tokenizer)
    assert str(raised.value) == (
        "data own: 2 of its tokens are beyond the model's embedding of 257 rows, the largest is 259 ('<|assistant|>'); "
        "use the tokenizer that the model was saved with, or resize the embedding (model.resize_token_embeddings) and "
        "save the model again"
    )
    with pytest.raises(InputError, match=r"1 of its tokens are .* the largest is 259; use"):
        check_vocabulary(ids, 259, "data own")
