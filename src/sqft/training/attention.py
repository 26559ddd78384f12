"""Attention over packed rows on a CPU: transformers' sdpa, one call per example.

Only the diagonal blocks of a packed row's attention matrix matter: with thirty examples in 2,048 tokens a thirtieth of
it. On a CPU sdpa computes all of it. Example boundaries come from the model's own mask: an example's first token does
not attend to the token before it. `benchmarks/attention.py` measures the gain.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sqft_by_example"


def attention_by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return transformers' sdpa attention, without the products between tokens of different examples.

    Args:
        module: the attention layer.
        query: [B, H, L, D].
        key: [B, G, L, D].
        value: [B, G, L, D].
        attention_mask: bool [B or 1, 1, L, L], causal, True = attended; None is one example a row.
        options: as transformers passes them.

    Returns:
        [B, L, H, D], and None for the weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool or query.shape[2] != attention_mask.shape[-1]:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    masks = attention_mask.expand(query.shape[0], -1, -1, -1)
    rows = []
    # split, not slices: the gradient of a slice is a whole row of zeros.
    for row_query, row_key, row_value, mask in zip(query.split(1), key.split(1), value.split(1), masks, strict=True):
        lengths = example_lengths(mask[0])
        parts, start = [], 0
        for part_query, part_key, part_value in zip(
            row_query.split(lengths, 2), row_key.split(lengths, 2), row_value.split(lengths, 2), strict=True
        ):
            seen = slice(start, start := start + part_query.shape[2])
            part_mask = mask[None, :, seen, seen]
            parts.append(sdpa_attention_forward(module, part_query, part_key, part_value, part_mask, **options)[0])
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def example_lengths(mask_LL: torch.Tensor) -> list[int]:
    """Return the lengths of a row's examples, from its causal mask, bool [L, L]."""
    starts = [0, *((~mask_LL.diagonal(-1)).nonzero().flatten() + 1).tolist(), mask_LL.shape[0]]
    return [after - start for start, after in pairwise(starts)]


AttentionInterface.register(NAME, attention_by_example)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_by_example(model: PreTrainedModel) -> None:
    """Replace sdpa by attention per example, for a model on a CPU.

    Not for models that check for the name sdpa, as Falcon does: they treat any other as their eager implementation.
    """
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.config._attn_implementation = NAME
