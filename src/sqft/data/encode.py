r"""Prompt and answer as tokens: the one rule of training, calibration and evaluation.

The prompt is tokenised as in generation: what the tokenizer puts before any text, such as a beginning token, and the
text's own tokens. What a tokenizer appends (an end token, as a post-processor `<s> $A </s>` does) is left out
everywhere: it would end the prompt before its answer, and the answer before the end token that training adds.

The answer's tokens are what follows the prompt's in the tokenised whole. For byte-level BPE and an answer that begins
with a space this equals `tokenizer(prompt) + tokenizer(answer, add_special_tokens=False)`. For SentencePiece as in
Llama-2 it does not: on its own, an answer gets a second leading blank that no generation produces. Where a token spans
the boundary, the prompt's own tokens win and the answer is tokenised alone, because a model that answers has read the
prompt's tokens.

lm-eval's rule is the same but for prompts that end in white space, which chat templates make (`assistant\n`): it moves
that white space into the answer, and a model that was trained on answers alone fails at it. Evaluation replaces
lm-eval's rule with this one; on the built-in tasks both give the same tokens, which a test holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sqft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sqft.data.tasks import Example


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the answer that follows it.

    Args:
        tokenizer: the model's tokenizer; it decides on a beginning token, unless the prompt brings one as text.
        prompt: not empty.
        answer: with its leading space.

    Returns:
        Ids of the prompt and ids of the answer. There is no end token unless the answer's text has it.
    """
    first = beginning(tokenizer)
    prompt_ids = _begun(first, plain_tokens(tokenizer, prompt))
    whole_ids = _begun(first, plain_tokens(tokenizer, prompt + answer))
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole_ids[len(prompt_ids) :]
    return prompt_ids, plain_tokens(tokenizer, answer)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a prompt alone, as in generation."""
    return _begun(beginning(tokenizer), plain_tokens(tokenizer, prompt))


def _begun(first: list[int], ids: list[int]) -> list[int]:
    """Return a text's tokens after the beginning tokens, which are not doubled if the text has them."""
    return ids if ids[: len(first)] == first else first + ids


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text without those that the tokenizer adds around it."""
    # verbose=False: a text longer than the model's context is the caller's to judge, with its file and its line.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts before any text; none for most byte-level ones.

    A probe tells them from those that it appends, because both may be the same token.
    """
    ids, probe = list(tokenizer("a")["input_ids"]), plain_tokens(tokenizer, "a")
    places = range(len(ids) - len(probe) + 1)
    return ids[: next((place for place in places if ids[place : place + len(probe)] == probe), 0)]


def ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return a text's token ids with the end token after them, once; unchanged where the tokenizer has none."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]


def check_vocabulary(
    ids: Iterable[int], rows: int, where: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        ids: token ids; negative ones mark what is no token, as in labels.
        rows: rows of the model's input embedding.
        where: names what was tokenised.
        tokenizer: what made the ids, to show the text of one.

    Raises:
        InputError: some are beyond the embedding.
    """
    beyond = [token for token in ids if token >= rows]
    if not beyond:
        return
    largest = max(beyond)
    shown = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
    raise InputError(
        f"{where}: {len(beyond)} of its tokens are beyond the model's embedding of {rows} rows, the largest is "
        f"{largest}{shown}; use the tokenizer that the model was saved with, or resize the embedding "
        "(model.resize_token_embeddings) and save the model again"
    )


def check_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], rows: int, where: str) -> None:
    """Refuse examples with tokens that the model has no embedding for; see :func:`check_vocabulary`.

    Args:
        tokenizer: the model's; where all of its tokens have an embedding, nothing is encoded.
        examples: prompts and answers.
        rows: rows of the model's input embedding.
        where: names the examples.
    """
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    texts = [
        (prompt, a) for e in examples for prompt in (e.contexts or (e.prompt,)) for a in (e.choices or (e.answer,))
    ]
    ids = [token for prompt, answer in texts for part in encode(tokenizer, prompt, answer) for token in part]
    check_vocabulary(ids, rows, where, tokenizer)
