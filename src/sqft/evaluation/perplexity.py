"""Perplexity of WikiText-2's test text, in the way of the GPTQ, SparseGPT and Wanda papers, on the tokenised text.

The text is one stream of tokens, cut into windows that do not overlap; each is predicted from its own start. The window
is 2,048 tokens, or the model's context where that is shorter. Where the tokenizer puts a beginning token before a text,
that is each window's first, and the text's first token is predicted from it: models that were only ever trained with it
(Gemma) predict poorly without. Not lm-eval's word perplexity, which divides by words.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import torch

from sqft.core.bfloat16 import fast_products
from sqft.data.calibration import perplexity_tokens
from sqft.data.encode import beginning
from sqft.progress import progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sqft.data.load import Data

WINDOW = 2048


def windows(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, read: Data | None = None) -> torch.Tensor:
    """Return the text as the windows that a model reads, int64 [windows, tokens]."""
    window = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    tokens = perplexity_tokens("wikitext2", "test", tokenizer, read)
    first = torch.tensor(beginning(tokenizer), dtype=torch.int64)
    text = window - len(first)
    rows = tokens[: len(tokens) // text * text].view(-1, text)
    return torch.cat([first.expand(len(rows), -1), rows], dim=1)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, read: Data | None = None
) -> dict[str, Any]:
    """Return {metric, value, stderr, n, window}: n windows; the error is that of the mean over them.

    Args:
        model: causal language model.
        tokenizer: the model's.
        limit: windows at most.
        read: what the run has read; None reads anew.
    """
    rows = windows(model.config, tokenizer, read)[:limit]
    losses = []
    with progress(len(rows), "perplexity", "window") as advance, fast_products(model):
        for row in rows:
            ids = row[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
            advance(1)
    value = math.exp(statistics.mean(losses))
    stderr = value * statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
    return {"metric": "perplexity", "value": value, "stderr": stderr, "n": len(losses), "window": rows.shape[1]}
