"""Answers of a causal language model in batches: greedy generation, and log-likelihoods of given answers.

What makes it faster than lm-eval's own loop, on a CPU above all:
- the output head runs over the requested positions only (`logits_to_keep`), and no log-softmax over the vocabulary is
  materialised.
- rows are sorted by length and read about 1,000 tokens at a time, whatever the batch: little padding, and a layer's
  activations stay in the processor's cache.
- sequences that share a prefix read it once and copy its cache: a prompt with its choices, and all rows of a task that
  begins with instructions. A choice of one token is judged by what its prompt predicts.
- continuous batching: when a row of a generation has ended, the next prompt takes its place.
- a decoding step skips cache columns that are padding in all of the shorter rows.
- weights of linears are laid out once for the processor's matrix kernels (:mod:`sqft.evaluation.prepacked`).

Log-likelihoods are taken in float32; lm-eval takes them in the dtype of the logits, which in bfloat16 makes ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sqft.evaluation.attention import evaluation_attention, join_caches
from sqft.evaluation.prepacked import prepacked
from sqft.evaluation.reader import WORTHWHILE, Likelihood, Reader, Tokens, chunks, common_length, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of a generation that have ended are replaced once they are this share of the batch: that copies the cache.
_ENDED_SHARE = 0.25


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    groups: Sequence[Sequence[tuple[Tokens, Tokens]]],
    batch: int,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[list[Likelihood]]:
    """Return the likelihood of each answer after its prompt.

    Args:
        model: causal language model for which `pads_freely` holds.
        groups: (prompt, answer) token ids; those of one group are likely to share a prefix. Neither is empty.
        batch: sequences at a time.
        progress: called with the number of sequences done, batch by batch.
    """
    reader = Reader(model)
    found = [[Likelihood(0.0, False)] * len(group) for group in groups]
    alone, shared = _by_prefix(groups, reader.window)
    if len(groups) > 1:
        # A token is left of each prefix, and of each prompt that is read with its answer.
        lengths = [common for _, common in shared] + [len(groups[index][member][0]) for index, member in alone]
        reader.begin([pair for group in groups for pair in group], min(lengths) - 1)

    def cost(place: tuple[int, int]) -> int:
        return reader.cost(len(whole(groups[place[0]][place[1]])))

    with evaluation_attention(reader.inner), prepacked(reader.inner):
        for places in chunks(alone, cost, batch, reader.tokens):
            pairs = [groups[index][member] for index, member in places]
            for (index, member), value in zip(places, reader.score(pairs), strict=True):
                found[index][member] = value
            progress(len(places))
        for chunk in chunks(shared, lambda place: reader.cost(place[1]), batch, reader.tokens):
            prefixes = [list(whole(groups[index][0]))[:common] for index, common in chunk]
            members = [(row, pair) for row, (index, _) in enumerate(chunk) for pair in groups[index]]
            values = iter(reader.score_after(prefixes, members, batch))
            for index, _ in chunk:
                found[index] = [next(values) for _ in groups[index]]
            progress(len(members))
    return found


def _by_prefix(
    groups: Sequence[Sequence[tuple[Tokens, Tokens]]], window: float
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (group, member) of sequences to read whole, and (group, prefix length) of groups that share a prefix.

    Both begin with the longest.
    """
    alone: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    for index, group in enumerate(groups):
        common, lengths = common_length(group), [len(whole(pair)) for pair in group]
        if common * (len(group) - 1) >= WORTHWHILE * sum(lengths) and 2 * max(lengths) <= window:
            shared.append((index, common))
        else:
            alone.extend((index, member) for member in range(len(group)))
    alone.sort(key=lambda place: len(whole(groups[place[0]][place[1]])), reverse=True)
    shared.sort(key=lambda place: place[1], reverse=True)
    return alone, shared


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    batch: int,
    ended: Callable[[Tokens], bool],
    progress: Callable[[int], Any] = lambda _: None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt.

    Args:
        model: causal language model for which `pads_freely` holds.
        prompts: token ids, none empty.
        max_new_tokens: tokens of a continuation at most.
        batch: prompts at a time.
        ended: whether a continuation is complete.
        progress: called with the number of further prompts done.
    """
    reader = Reader(model)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers = _Answers(len(prompts), max_new_tokens, ended, progress)
    with evaluation_attention(reader.inner), prepacked(reader.inner):
        if len(prompts) > 1:
            reader.begin([(prompt, ()) for prompt in prompts], min(map(len, prompts)) - 1)
        _continue(reader, [prompts[index] for index in order], batch, answers)
    found: list[list[int]] = [[] for _ in prompts]
    for index, tokens in zip(order, answers.tokens, strict=True):
        found[index] = tokens
    return found


class _Answers:
    """The continuations so far, and which of them go on."""

    def __init__(self, count: int, most: int, ended: Callable[[Tokens], bool], progress: Callable[[int], Any]) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.alive = [True] * count
        self._most, self._ended, self._progress = most, ended, progress

    def append(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        """Append a token to each of these rows that has not ended."""
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if self.alive[row]:
                found = self.tokens[row]
                found.append(token)
                self.alive[row] = len(found) < self._most and not self._ended(found)
                if not self.alive[row]:
                    self._progress(1)


def _continue(reader: Reader, prompts: Sequence[Tokens], batch: int, answers: _Answers) -> None:
    """Continue prompts, longest first.

    When rows of the batch have ended the next take their places. Those are no longer than the ones before them, so
    their caches are padded and never cut. Where caches cannot be joined they wait until the whole batch has ended.
    """
    waiting = list(range(len(prompts)))
    rows: list[int] = []
    tokens = mask = torch.empty(0)
    cache: Any = None
    while waiting or rows:
        kept = [place for place, row in enumerate(rows) if answers.alive[row]]
        if not kept:
            rows = []
        elif len(rows) - len(kept) >= _ENDED_SHARE * len(rows):
            rows = [rows[place] for place in kept]
            tokens, mask, cache = reader.keep(kept, tokens, mask, cache)
        free = batch - len(rows)
        if waiting and (not rows or (reader.joins and free >= _ENDED_SHARE * batch)):
            fresh, waiting = waiting[:free], waiting[free:]
            logits, fresh_mask, fresh_cache = reader.read([prompts[row] for row in fresh])
            first = _likeliest(logits[:, -1])
            answers.append(fresh, first)
            if rows:
                fresh_mask = functional.pad(fresh_mask, (mask.shape[1] - fresh_mask.shape[1], 0))
                tokens, mask = torch.cat([tokens, first]), torch.cat([mask, fresh_mask])
                cache = join_caches([cache, fresh_cache])
            else:
                tokens, mask, cache = first, fresh_mask, fresh_cache
            rows = rows + fresh
        elif rows:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits, cache = reader(tokens[:, None], mask, 1, cache, use_cache=True)
            tokens = _likeliest(logits[:, -1])
            answers.append(rows, tokens)


def _likeliest(logits_BV: torch.Tensor) -> torch.Tensor:
    """Return argmax over the vocabulary, [B]; on a CPU `max` finds the same index faster in bfloat16."""
    return logits_BV.max(dim=-1).indices
