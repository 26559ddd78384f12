r"""Prompt and answer as tokens: the one rule of training, calibration and evaluation.

The prompt is tokenised as generation meets it (`tokenizer(prompt)`, with the beginning token if the tokenizer adds
one); the answer's tokens are what follows it in the tokenised whole. For byte-level BPE and an answer that begins with
a space this equals `tokenizer(prompt) + tokenizer(answer, add_special_tokens=False)`. For SentencePiece as in Llama-2
it does not: on its own, an answer gets a second leading blank that no generation produces. Where a token spans the
boundary, the prompt's own tokens win and the answer is tokenised alone, because a model that answers has read the
prompt's tokens.

lm-eval's rule is the same but for prompts that end in white space, which chat templates make (`assistant\n`): it moves
that white space into the answer, and a model that was trained on answers alone fails at it. Evaluation replaces
lm-eval's rule with this one; on the built-in tasks both give the same tokens, which a test holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the answer that follows it.

    Args:
        tokenizer: the model's tokenizer; it decides on a beginning token, unless the prompt brings one as text.
        prompt: not empty.
        answer: with its leading space.

    Returns:
        Ids of the prompt and ids of the answer. There is no end token unless the answer's text has it.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    whole_ids = encode_prompt(tokenizer, prompt + answer)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole_ids[len(prompt_ids) :]
    return prompt_ids, list(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a prompt alone, as generation meets it."""
    bos = tokenizer.bos_token
    special = not (isinstance(bos, str) and prompt.startswith(bos))
    # verbose=False: a text longer than the model's context is the caller's to judge, with its file and its line.
    return list(tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"])
