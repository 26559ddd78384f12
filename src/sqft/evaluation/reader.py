"""Runs a causal language model over left-padded batches, with what its forward accepts.

Padding is masked, and position ids count real tokens alone; :func:`sqft.evaluation.attention.pads_freely` says which
models allow that. A prefix that all sequences share is read once; its cache is copied for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sqft.errors import InputError
from sqft.evaluation.attention import (
    RoomyLayer,
    inner_model,
    join_caches,
    roomy_cache,
    select_columns,
    select_rows,
    skipping_padding,
    takes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int]
# Columns of the cache that are padding in all rows are dropped once they are so many: that copies the cache.
_UNUSED = 16
# A shared prefix is read once if that saves at least this share of the tokens: it costs a forward of its own.
WORTHWHILE = 0.2
# Tokens of a forward on a CPU: what lies between its products then stays in the processor's cache (docs/decisions.md).
_TOKENS = 1024
# Where suffixes are scored, `batch` counts rows of so many tokens, prefix included; of shorter ones more fit.
_CACHED = 256


@dataclass(frozen=True)
class Likelihood:
    """How likely an answer is to a model.

    Attributes:
        total: log-likelihood of the answer's tokens, natural logarithm.
        greedy: whether each of its tokens is the most likely one after those before it.
    """

    total: float
    greedy: bool


def whole(pair: tuple[Tokens, Tokens]) -> list[int]:
    """Return prompt and answer as one sequence."""
    return [*pair[0], *pair[1]]


def fit(prompt: list[int], answer: list[int], most: float) -> tuple[list[int], list[int]]:
    """Return a pair whose prompt is cut from the left so that all but the last token are at most `most`.

    Raises:
        InputError: the answer leaves no room for a prompt.
    """
    excess = len(prompt) + len(answer) - 1 - most
    if excess <= 0:
        return prompt, answer
    if excess >= len(prompt):
        raise InputError(f"an answer of {len(answer)} tokens leaves no room for its prompt in the model's {most}")
    return prompt[int(excess) :], answer


def common_length(group: Sequence[tuple[Tokens, Tokens]]) -> int:
    """Return the length of the prefix that all sequences share, no answer in it."""
    first = whole(group[0])
    common = min(len(prompt) for prompt, _ in group)
    for pair in group[1:]:
        other = whole(pair)
        common = next((i for i in range(min(common, len(other))) if first[i] != other[i]), common)
    return common


def chunks(items: Sequence[Any], tokens: Callable[[Any], int], most: int, room: float) -> Iterator[list[Any]]:
    """Yield runs of at most `most` items whose tokens add up to at most `room`, at least one item each."""
    chunk: list[Any] = []
    size = 0
    for item in items:
        if chunk and (len(chunk) == most or size + tokens(item) > room):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += tokens(item)
    if chunk:
        yield chunk


class Reader:
    """Runs a model over left-padded rows, with what its forward understands."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.inner = inner = inner_model(model)
        self.takes_positions = takes(inner, "position_ids")
        self.takes_keep = takes(inner, "logits_to_keep")
        # Padding separates a shared prefix from its suffix, and a sliding window would count it.
        windows = [layer.sliding_window for layer in roomy_cache(inner).layers if hasattr(layer, "sliding_window")]
        self.window: float = min(windows, default=float("inf"))
        # Whether caches can be joined; those with a sliding window cannot.
        self.joins = all(isinstance(layer, RoomyLayer) for layer in roomy_cache(inner).layers)
        self.tokens: float = _TOKENS if inner.device.type == "cpu" else float("inf")
        self.device = inner.device
        # The prefix that all sequences share, once it is read: its length, and its cache of one row.
        self.common = 0
        self.begun: Any = None

    def begin(self, pairs: Sequence[tuple[Tokens, Tokens]], most: int) -> None:
        """Read the prefix that all (prompt, answer) share, up to `most` tokens, if it is worth a forward of its own."""
        common = min(common_length(pairs), most)
        tokens = sum(len(prompt) + len(answer) for prompt, answer in pairs)
        if self.joins and common * (len(pairs) - 1) >= WORTHWHILE * tokens:
            _, _, self.begun = self.read_rows([whole(pairs[0])[:common]], 1, use_cache=True)
            self.common = common

    def cost(self, length: int) -> int:
        """Return how many tokens a row counts for: its copy of the shared prefix is cheap but takes memory."""
        return length - self.common + self.common // 8

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, keep: int, cache: Any, *, use_cache: bool) -> Any:
        """Return (logits [B, keep, V], cache) of the rows `ids`, the last columns of what `mask` covers."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self.takes_keep else {}
        if self.takes_positions:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        decodes = cache is not None and ids.shape[1] == 1
        with skipping_padding(mask) if decodes and self.device.type == "cpu" else nullcontext():
            output = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=use_cache, **options
            )
        return output.logits[:, -keep:], output.past_key_values if use_cache else None

    def pad(self, rows: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids, mask), both [B, L] with padding on the left."""
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def read_rows(
        self, rows: Sequence[Tokens], keep: int, *, use_cache: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return (logits [B, keep, V], mask [B, L], cache or None) of whole sequences."""
        ids, mask = self.pad([row[self.common :] for row in rows])
        if self.common:
            every = torch.zeros(len(rows), dtype=torch.long, device=self.device)
            mask = functional.pad(mask, (self.common, 0), value=1)
            logits, cache = self(ids, mask, keep, select_rows(self.begun, every), use_cache=True)
        else:
            logits, cache = self(ids, mask, keep, roomy_cache(self.inner) if use_cache else None, use_cache=use_cache)
        return logits, mask, cache

    def score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        """Return the likelihood of each answer."""
        longest = max(len(answer) for _, answer in pairs)
        logits, _, _ = self.read_rows([whole(pair)[:-1] for pair in pairs], longest, use_cache=False)
        return [judge(row, answer) for row, (_, answer) in zip(logits, pairs, strict=True)]

    def score_after(
        self, prefixes: Sequence[Tokens], members: Sequence[tuple[int, tuple[Tokens, Tokens]]], batch: int
    ) -> list[Likelihood]:
        """Score sequences that each begin with one of `prefixes`, which are read once.

        A prefix that is a whole prompt predicts the first token of its answers, so an answer of one token needs no
        forward of its own. Other suffixes are a few tokens, and a forward costs as much as its weights: more than
        `batch` rows share one if they are short, their copies of the cache being what takes memory.

        Args:
            prefixes: no answer in them.
            members: (index of its prefix, (prompt, answer)).
            batch: sequences at a time.
        """
        begun, prefix_mask, cache = self.read_rows(prefixes, 1, use_cache=True)
        found: list[Likelihood] = [Likelihood(0.0, False)] * len(members)

        def suffix(place: int) -> int:
            row, (prompt, answer) = members[place]
            return len(prompt) + len(answer) - 1 - len(prefixes[row])

        def predicted(row: int, pair: tuple[Tokens, Tokens]) -> int:
            """Return how many of the answer's tokens the suffix predicts: the prefix may have predicted the first."""
            return len(pair[1]) - (len(pair[0]) == len(prefixes[row]))

        order = sorted(range(len(members)), key=suffix, reverse=True)
        waiting = [place for place in order if suffix(place)]
        for place in order[len(waiting) :]:
            row, (_, answer) = members[place]
            found[place] = judge(begun[row], answer)
        most = max(batch, batch * _CACHED // (prefix_mask.shape[1] + suffix(order[0])))
        for places in chunks(waiting, suffix, most, self.tokens):
            chosen = [members[place] for place in places]
            rows = torch.tensor([row for row, _ in chosen], device=self.device)
            ids, mask = self.pad([whole(pair)[len(prefixes[row]) : -1] for row, pair in chosen])
            longest = max(predicted(row, pair) for row, pair in chosen)
            mask = torch.cat([prefix_mask[rows], mask], dim=1)
            logits, _ = self(ids, mask, longest, select_rows(cache, rows), use_cache=True)
            for place, logits_LV, (row, pair) in zip(places, logits, chosen, strict=True):
                found[place] = judge(torch.cat([begun[row], logits_LV[-predicted(row, pair) :]]), pair[1])
        return found

    def read(self, prompts: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return (logits of the last token [B, 1, V], mask [B, L], cache) of prompts, longest first."""
        parts = []
        room = self.tokens if self.joins else float("inf")
        for chunk in chunks(prompts, lambda prompt: self.cost(len(prompt)), len(prompts), room):
            parts.append(self.read_rows(chunk, 1, use_cache=True))
        if len(parts) == 1:
            return parts[0]
        width = parts[0][1].shape[1]
        masks = [functional.pad(mask, (width - mask.shape[1], 0)) for _, mask, _ in parts]
        return torch.cat([logits for logits, _, _ in parts]), torch.cat(masks), join_caches([c for _, _, c in parts])

    def keep(
        self, places: list[int], tokens: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return tokens, mask and cache of these rows, without the columns that are padding in all if they are many."""
        chosen = torch.tensor(places, device=self.device)
        cache.batch_select_indices(chosen)
        tokens, mask = tokens[chosen], mask[chosen]
        used = mask.any(dim=0)
        if self.joins and int((~used).sum()) >= _UNUSED:
            columns = used.nonzero().squeeze(1)
            mask = mask[:, columns]
            select_columns(cache, columns)
        return tokens, mask, cache


def judge(logits_LV: torch.Tensor, answer: Tokens) -> Likelihood:
    """Return the likelihood of an answer that the last rows of the logits predict."""
    last = logits_LV[-len(answer) :].float()
    ids = torch.tensor(answer, device=last.device)
    total = last.gather(1, ids[:, None]).squeeze(1) - last.logsumexp(dim=-1)
    return Likelihood(float(total.sum()), bool((last.argmax(dim=-1) == ids).all()))
