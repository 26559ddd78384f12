"""Attention and KV cache for evaluation on a CPU, where the stock ones spend more time copying than computing.

The stock ones copy each key-value head for its query heads, and the whole cache to append one token. Here grouped query
heads share their key-value head in one attention call (the same kernel, the same precision), and the cache is allocated
with spare capacity. `benchmarks/evaluation.py` measures both.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sqft_grouped"
_ROOM = 64
# Cache cells (row × column) that a separate call must skip to be worth it.
_WORTH_A_CALL = 2048


@dataclass(frozen=True)
class _Spans:
    """The rows of a decoding step, grouped by the first cache column that any of them uses.

    Attributes:
        columns: of the whole cache. Layers with fewer (sliding windows) are not split.
        parts: (rows, first column).
    """

    columns: int
    parts: list[tuple[slice, int]]


_SPANS: ContextVar[_Spans | None] = ContextVar("spans", default=None)


@contextmanager
def skipping_padding(mask_BL: torch.Tensor) -> Iterator[None]:
    """Let :func:`grouped_attention` skip cache columns that are padding in a row and in all rows after it.

    Args:
        mask_BL: of a decoding step, which has one query a row; padded on the left, best with the longest rows first.
    """
    rows, columns = mask_BL.shape
    needed = list(accumulate(reversed(mask_BL.argmax(dim=1).tolist()), min))[::-1]
    parts, begin = [], 0
    for row in range(1, rows):
        if (needed[row] - needed[begin]) * (rows - row) >= _WORTH_A_CALL:
            parts.append((slice(begin, row), needed[begin]))
            begin = row
    parts.append((slice(begin, rows), needed[begin]))
    token = _SPANS.set(_Spans(columns, parts))
    try:
        yield
    finally:
        _SPANS.reset(token)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return transformers' sdpa attention, without copies of keys and values for the query heads that share them.

    In a decoding step inside :func:`skipping_padding`, shorter rows attend in separate calls, without their padding
    columns.

    Args:
        module: the attention layer.
        query: [B, H, Q, D].
        key: [B, G, L, D], G key-value heads of H / G query heads each.
        value: [B, G, L, D].
        attention_mask: [B, 1, Q, L] or None.
        scaling: of the scores.
        options: as transformers passes them.

    Returns:
        [B, Q, H, D], and None for the weights.
    """
    spans = _SPANS.get()
    if spans is None or attention_mask is None or attention_mask.shape != (query.shape[0], 1, 1, spans.columns):
        return _attention(module, query, key, value, attention_mask, scaling, options), None
    found = [
        _attention(
            module,
            query[rows],
            key[rows, :, first:],
            value[rows, :, first:],
            attention_mask[rows, :, :, first:],
            scaling,
            options,
        )
        for rows, first in spans.parts
    ]
    return torch.cat(found), None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    options: dict[str, Any],
) -> torch.Tensor:
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    # Without a mask stock attention shares keys and values too, but reads them once for each query head.
    plain = queries > 1 if attention_mask is None else attention_mask.shape[1] > 1
    if groups == heads or plain or options.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return output
    if queries == 1:
        # The query heads of a key-value head as rows of one product: each key is read once.
        query = query.reshape(batch, groups, heads // groups, width)
    found = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=queries > 1
    )
    return found.reshape(batch, heads, queries, value.shape[-1]).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def inner_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside one with adapters: its forward says what the model takes."""
    return cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())


def pads_freely(model: PreTrainedModel) -> bool:
    """Return whether padding inside a row, and rows that join or leave a batch, do not change a model's answers.

    That holds if the cache has a key and a value per token, and positions are passed in or, as in BLOOM, counted from
    the attention mask. A recurrent state cannot be split by row, and MPT counts cache columns, padding included.
    """
    inner = inner_model(model)
    placed = takes(inner, "position_ids") or inner.config.model_type == "bloom"
    layers = {type(layer) for layer in roomy_cache(inner).layers}
    return placed and not inner._is_stateful and layers <= {RoomyLayer, DynamicSlidingWindowLayer}


def takes(inner: PreTrainedModel, name: str) -> bool:
    """Tell whether a model's forward has a parameter of that name."""
    return name in inspect.signature(type(inner).forward).parameters


@contextmanager
def evaluation_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use :func:`grouped_attention` inside the block, on a CPU and in place of sdpa alone.

    Not in models that check for the name sdpa, as Falcon does: they treat any other as their eager implementation.
    """
    config = model.config
    stock = getattr(config, "_attn_implementation", None)
    if stock != "sdpa" or model.device.type != "cpu" or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = stock


class RoomyLayer(DynamicLayer):
    """A cache layer with spare capacity: it appends in place, and is copied when rows join or leave."""

    keys_room: torch.Tensor | None = None
    values_room: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, G, T, D] and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        return self._append("keys", length, key_states), self._append("values", length, value_states)

    def _append(self, name: str, length: int, new: torch.Tensor) -> torch.Tensor:
        filled, room = getattr(self, name), getattr(self, f"{name}_room")
        whole = length + new.shape[2]
        if room is None or room.shape[0] != new.shape[0] or room.shape[2] < whole:
            room = self.make_room(name, new, new.shape[0], whole)
            if length:
                room[:, :, :length] = filled
        room[:, :, length:whole] = new
        setattr(self, name, room[:, :, :whole])
        return cast("torch.Tensor", getattr(self, name))

    def make_room(self, name: str, like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
        """Make the keys or values of that many rows and tokens, with room for more; return all of it, to be filled.

        Args:
            name: `keys` or `values`.
            like: [B, G, T, D], with their heads, width and dtype.
            rows: B.
            length: T.
        """
        room = like.new_empty(rows, like.shape[1], length + _ROOM, like.shape[3])
        setattr(self, f"{name}_room", room)
        setattr(self, name, room[:, :, :length])
        return room

    def select(self, dimension: int, indices: torch.Tensor) -> None:
        """Keep those rows (dimension 0) or tokens (dimension 2)."""
        for name in ("keys", "values"):
            filled = getattr(self, name)
            rows, _, length, _ = filled.shape
            if dimension == 0:
                rows = len(indices)
            else:
                length = len(indices)
            room = self.make_room(name, filled, rows, length)
            torch.index_select(filled, dimension, indices, out=room[:, :, :length])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep those rows of the batch."""
        if self.get_seq_length() > 0:
            self.select(0, indices)


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for a model; layers with a window keep transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Return one cache of the rows of several, the first of which is the longest; shorter ones are padded on the left.

    Each cache is emptied as it is taken over. Every layer must be a :class:`RoomyLayer`.
    """
    whole = caches[0]
    for index, layer in enumerate(whole.layers):
        layers = [cast("RoomyLayer", cache.layers[index]) for cache in caches]
        length = layers[0].get_seq_length()
        for name in ("keys", "values"):
            parts = [getattr(part, name) for part in layers]
            room = cast("RoomyLayer", layer).make_room(name, parts[0], sum(part.shape[0] for part in parts), length)
            row = 0
            for part in parts:
                rows = room[row : row + part.shape[0]]
                rows[:, :, : length - part.shape[2]] = 0
                rows[:, :, length - part.shape[2] : length] = part
                row += part.shape[0]
        for part in layers[1:]:
            part.keys = part.values = part.keys_room = part.values_room = None
    return whole


def select_columns(cache: DynamicCache, columns: torch.Tensor) -> None:
    """Keep those tokens of a cache. Every layer must be a :class:`RoomyLayer`."""
    for layer in cache.layers:
        cast("RoomyLayer", layer).select(2, columns)


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """Return a cache of these rows, which may repeat; the given one stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
