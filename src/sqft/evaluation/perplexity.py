"""Perplexity on WikiText-2's test text as in the GPTQ, SparseGPT and Wanda papers, on the already tokenised text.

The text is one stream of tokens, split into non-overlapping windows that are scored independently. A window has 2,048
tokens, or the model's context length if that is shorter. If the tokenizer adds a BOS token, every window starts with
it: models that were only trained with it (Gemma) predict poorly without. This is not lm-eval's word perplexity, which
divides by words.
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
    """Return the text as windows, int64 [windows, tokens]."""
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
    """Return {metric, value, stderr, n, window}; stderr is the standard error over the n windows.

    Args:
        model: causal language model.
        tokenizer: the model's.
        limit: windows at most.
        read: the run's data cache; None reads without one.
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
