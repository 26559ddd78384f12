"""Negative log-likelihood of right answers: shows differences too small for the accuracy over a few hundred rows.

The tokens are those of the training loss: the answer and its EOS token, given the prompt. So the value is comparable
with training's validation loss.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from sqft.data.encode import encode, ended
from sqft.evaluation.attention import pads_freely
from sqft.evaluation.decoding import likelihoods
from sqft.evaluation.reader import fit, judge, whole
from sqft.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sqft.data.tasks import Example


Pair = tuple[list[int], list[int]]
"""Tokens of a prompt and of its answer."""


def answer_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Pair]:
    """Return (prompt, answer with its EOS token) of each example, as token ids.

    A prompt longer than the model's context is truncated from the left.

    Raises:
        InputError: an answer leaves no room for its prompt in the model's context.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    encoded = [encode(tokenizer, example.prompt, example.answer) for example in examples]
    return [fit(prompt, ended(tokenizer, answer), most or math.inf) for prompt, answer in encoded]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, pairs: Sequence[Pair], batch: int) -> list[float]:
    """Return the log-likelihood of each answer after its prompt, in nats.

    Args:
        model: causal language model in the dtype that it has; logarithms are taken in float32.
        pairs: from :func:`answer_pairs`.
        batch: sequences at a time.
    """
    with progress(len(pairs), "likelihoods", "answer") as advance:
        if pads_freely(model):
            return [found.total for (found,) in likelihoods(model, [[pair] for pair in pairs], batch, advance)]
        totals = []
        for pair in pairs:
            ids = torch.tensor([whole(pair)[:-1]], device=model.device)
            totals.append(judge(model(input_ids=ids, use_cache=False).logits[0], pair[1]).total)
            advance(1)
        return totals


def answer_nll(pairs: Sequence[Pair], totals: Sequence[float]) -> dict[str, Any]:
    """Return {metric, value, stderr, n, tokens, rows}: nats a token, and for each row its tokens and its nats.

    `value` is the mean over all tokens, Σ rows / Σ tokens; `stderr` is the standard error of this ratio over rows.

    Args:
        pairs: at least one.
        totals: the log-likelihood of each pair's answer.
    """
    tokens = [len(answer) for _, answer in pairs]
    rows = [round(-total, 4) for total in totals]
    value = sum(rows) / sum(tokens)
    return {
        "metric": "nll",
        "value": value,
        "stderr": ratio_error([nats - value * count for nats, count in zip(rows, tokens, strict=True)], sum(tokens)),
        "n": len(pairs),
        "tokens": tokens,
        "rows": rows,
    }


def ratio_error(residuals: Sequence[float], tokens: int) -> float | None:
    """Return the standard error of Σ nats / Σ tokens, by linearisation: √(n / (n − 1) · Σ residual²) / Σ tokens.

    Args:
        residuals: for each row, its nats minus the ratio times its tokens; they sum to 0.
        tokens: of all rows.
    """
    n = len(residuals)
    return (n / (n - 1) * sum(r * r for r in residuals)) ** 0.5 / tokens if n > 1 else None
