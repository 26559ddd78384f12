"""Answers of a causal language model in batches: greedy generation, and log-likelihoods of given answers.

What makes it fast, on a CPU above all, where lm-eval's own way spends most of its time elsewhere:
- the output head runs over the positions that are asked for, not over whole prompts (`logits_to_keep`), and no
  log-softmax over the vocabulary is written out.
- rows are sorted by length and read some 1,000 tokens at a time, whatever the batch: little of it is padding, and what
  a layer makes stays in the processor's cache.
- sequences that begin alike read the common part once: its keys and values are copied for each. A prompt and its
  choices do, and all rows of a task that begins with instructions.
- a row of a generation leaves the batch when it has ended, and the next prompt takes its place.
- a step of a generation reads, of the cache, no padding that shorter rows have in common.
- the linears' weights are laid out once for the processor's matrix kernels (:mod:`sqft.evaluation.prepacked`).

Padding is masked, and position ids count real tokens alone; what a model must be like for that says
:func:`sqft.evaluation.attention.pads_freely`. Likelihoods are taken in float32 from
the model's logits; lm-eval takes them in the logits' own dtype, which in bfloat16 makes ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sqft.evaluation.attention import (
    RoomyLayer,
    evaluation_attention,
    inner_model,
    join_caches,
    roomy_cache,
    select_columns,
    select_rows,
    skipping_padding,
    takes,
)
from sqft.evaluation.prepacked import prepacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int]
# Rows of a generation that have ended are replaced once they are this share of the batch: that copies the cache.
_ENDED_SHARE = 0.25
# Columns of the cache that are padding in all rows go once they are so many: that copies it too.
_UNUSED = 16
# A common beginning is read once where that saves at least this share of the tokens; it costs a forward of its own.
_WORTHWHILE = 0.2
# Tokens of a forward on a CPU: what lies between its products then stays in the processor's cache (docs/decisions.md).
_TOKENS = 1024


@dataclass(frozen=True)
class Likelihood:
    """How a model takes to an answer.

    Attributes:
        total: log-likelihood of the answer's tokens, natural logarithm.
        greedy: whether each of its tokens is the most likely one after those before it.
    """

    total: float
    greedy: bool


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
        groups: (prompt, answer) token ids; those of one group are likely to begin alike. Neither is empty.
        batch: sequences at a time.
        progress: told the number of sequences that are done, batch by batch.
    """
    reader = _Reader(model)
    found: list[list[Likelihood]] = [[] for _ in groups]
    alone: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    for index, group in enumerate(groups):
        found[index] = [Likelihood(0.0, False)] * len(group)
        common = _common_length(group)
        lengths = [len(prompt) + len(answer) for prompt, answer in group]
        if common * (len(group) - 1) >= _WORTHWHILE * sum(lengths) and 2 * max(lengths) <= reader.window:
            shared.append((index, common))
        else:
            alone.extend((index, member) for member in range(len(group)))

    if len(groups) > 1:
        # A group's own beginning goes on after what all begin with.
        most = min((common - 1 for _, common in shared), default=len(groups[0][0][0]))
        reader.begin([pair for group in groups for pair in group], most)

    def length(place: tuple[int, int]) -> int:
        prompt, answer = groups[place[0]][place[1]]
        return len(prompt) + len(answer)

    alone.sort(key=length, reverse=True)
    shared.sort(key=lambda place: place[1], reverse=True)
    with evaluation_attention(reader.inner), prepacked(reader.inner):
        for places in _chunks(alone, lambda place: reader.cost(length(place)), batch, reader.tokens):
            pairs = [groups[index][member] for index, member in places]
            for (index, member), value in zip(places, reader.score(pairs), strict=True):
                found[index][member] = value
            progress(len(places))
        for chunk in _chunks(shared, lambda place: reader.cost(place[1]), batch, reader.tokens):
            begins = [list(_whole(groups[index][0]))[:common] for index, common in chunk]
            members = [(row, pair) for row, (index, _) in enumerate(chunk) for pair in groups[index]]
            values = iter(reader.score_after(begins, members, batch))
            for index, _ in chunk:
                found[index] = [next(values) for _ in groups[index]]
            progress(len(members))
    return found


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
        ended: told a continuation so far, says whether it ends here.
        progress: told how many more prompts are done, now and then.
    """
    reader = _Reader(model)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    with evaluation_attention(reader.inner), prepacked(reader.inner):
        if len(prompts) > 1:
            reader.begin([(prompt, ()) for prompt in prompts], len(prompts[0]))
        continued = reader.continue_([prompts[index] for index in order], batch, max_new_tokens, ended, progress)
    for index, tokens in zip(order, continued, strict=True):
        found[index] = tokens
    return found


def _whole(pair: tuple[Tokens, Tokens]) -> list[int]:
    return [*pair[0], *pair[1]]


def _common_length(group: Sequence[tuple[Tokens, Tokens]]) -> int:
    """Return how many tokens all sequences begin with alike, without the last token before any answer.

    That token's output predicts the answer's first, so it is read with the answer.
    """
    first = _whole(group[0])
    common = min(len(prompt) for prompt, _ in group) - 1
    for pair in group[1:]:
        other = _whole(pair)
        common = next((i for i in range(min(common, len(other))) if first[i] != other[i]), common)
    return common


def _chunks(items: Sequence[Any], tokens: Callable[[Any], int], most: int, room: float) -> Iterator[list[Any]]:
    """Yield runs of at most `most` items whose tokens add up to at most `room`, at least one item each."""
    chunk: list[Any] = []
    held = 0
    for item in items:
        if chunk and (len(chunk) == most or held + tokens(item) > room):
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += tokens(item)
    if chunk:
        yield chunk


class _Reader:
    """Runs a model over left-padded rows, with what its forward understands."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.inner = inner = inner_model(model)
        self.takes_positions = takes(inner, "position_ids")
        self.takes_keep = takes(inner, "logits_to_keep")
        # Between a shared beginning and what follows it stands padding, which a sliding window would count.
        windows = [layer.sliding_window for layer in roomy_cache(inner).layers if hasattr(layer, "sliding_window")]
        self.window: float = min(windows, default=float("inf"))
        # Caches that are filled in parts are put together, which a sliding window's does not allow.
        self.joins = all(isinstance(layer, RoomyLayer) for layer in roomy_cache(inner).layers)
        self.tokens: float = _TOKENS if inner.device.type == "cpu" else float("inf")
        self.device = inner.device
        # What all sequences begin with, once it is read: its length, and its cache of one row.
        self.common = 0
        self.begun: Any = None

    def begin(self, pairs: Sequence[tuple[Tokens, Tokens]], most: int) -> None:
        """Read what all (prompt, answer) begin with, up to `most` tokens, if that is worth a forward of its own."""
        common = min(_common_length(pairs), most)
        whole = sum(len(prompt) + len(answer) for prompt, answer in pairs)
        if self.joins and common * (len(pairs) - 1) >= _WORTHWHILE * whole:
            _, _, self.begun = self.read_rows([_whole(pairs[0])[:common]], 1, use_cache=True)
            self.common = common

    def cost(self, length: int) -> int:
        """Return how many tokens a row of some length counts for: what is copied for it is cheap but takes room."""
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
        longest = max(len(answer) for _, answer in pairs)
        logits, _, _ = self.read_rows([_whole(pair)[:-1] for pair in pairs], longest, use_cache=False)
        return [_judge(row, answer) for row, (_, answer) in zip(logits, pairs, strict=True)]

    def score_after(
        self, begins: Sequence[Tokens], members: Sequence[tuple[int, tuple[Tokens, Tokens]]], batch: int
    ) -> list[Likelihood]:
        """Score sequences of which each begins with one of `begins`, which are read once."""
        _, begin_mask, cache = self.read_rows(begins, 1, use_cache=True)
        found: list[Likelihood] = [Likelihood(0.0, False)] * len(members)

        def rest(place: int) -> int:
            row, (prompt, answer) = members[place]
            return len(prompt) + len(answer) - len(begins[row])

        order = sorted(range(len(members)), key=rest, reverse=True)
        for places in _chunks(order, rest, batch, self.tokens):
            chosen = [members[place] for place in places]
            rows = torch.tensor([row for row, _ in chosen], device=self.device)
            ids, mask = self.pad([_whole(pair)[len(begins[row]) : -1] for row, pair in chosen])
            longest = max(len(answer) for _, (_, answer) in chosen)
            mask = torch.cat([begin_mask[rows], mask], dim=1)
            logits, _ = self(ids, mask, longest, select_rows(cache, rows), use_cache=True)
            for place, row, (_, (_, answer)) in zip(places, logits, chosen, strict=True):
                found[place] = _judge(row, answer)
        return found

    def read(self, prompts: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return (logits of the last token [B, 1, V], mask [B, L], cache) of prompts, longest first."""
        parts = []
        room = self.tokens if self.joins else float("inf")
        for chunk in _chunks(prompts, lambda prompt: self.cost(len(prompt)), len(prompts), room):
            parts.append(self.read_rows(chunk, 1, use_cache=True))
        if len(parts) == 1:
            return parts[0]
        width = parts[0][1].shape[1]
        masks = [functional.pad(mask, (width - mask.shape[1], 0)) for _, mask, _ in parts]
        return torch.cat([logits for logits, _, _ in parts]), torch.cat(masks), join_caches([c for _, _, c in parts])

    def continue_(
        self,
        prompts: Sequence[Tokens],
        batch: int,
        max_new_tokens: int,
        ended: Callable[[Tokens], bool],
        progress: Callable[[int], Any],
    ) -> list[list[int]]:
        """Return the continuations of prompts, longest first.

        When rows of the batch have ended the next take their places. Those are no longer than the ones before them, so
        their caches are padded and never cut. Without joining, they wait until the whole batch has ended.
        """
        found: list[list[int]] = [[] for _ in prompts]
        alive = [True] * len(prompts)
        waiting = list(range(len(prompts)))
        rows: list[int] = []
        tokens = mask = torch.empty(0)
        cache: Any = None

        def record(rows: Sequence[int], tokens: torch.Tensor) -> None:
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if alive[row]:
                    found[row].append(token)
                    alive[row] = len(found[row]) < max_new_tokens and not ended(found[row])
                    if not alive[row]:
                        progress(1)

        while waiting or rows:
            kept = [place for place, row in enumerate(rows) if alive[row]]
            if not kept:
                rows = []
            elif len(rows) - len(kept) >= _ENDED_SHARE * len(rows):
                rows = [rows[place] for place in kept]
                tokens, mask, cache = self._keep(kept, tokens, mask, cache)
            free = batch - len(rows)
            if waiting and (not rows or (self.joins and free >= _ENDED_SHARE * batch)):
                fresh, waiting = waiting[:free], waiting[free:]
                logits, fresh_mask, fresh_cache = self.read([prompts[row] for row in fresh])
                first = _likeliest(logits[:, -1])
                record(fresh, first)
                if rows:
                    fresh_mask = functional.pad(fresh_mask, (mask.shape[1] - fresh_mask.shape[1], 0))
                    tokens, mask = torch.cat([tokens, first]), torch.cat([mask, fresh_mask])
                    cache = join_caches([cache, fresh_cache])
                else:
                    tokens, mask, cache = first, fresh_mask, fresh_cache
                rows = rows + fresh
            elif rows:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                logits, cache = self(tokens[:, None], mask, 1, cache, use_cache=True)
                tokens = _likeliest(logits[:, -1])
                record(rows, tokens)
        return found

    def _keep(
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


def _likeliest(logits_BV: torch.Tensor) -> torch.Tensor:
    """Return argmax over the vocabulary, [B]; on a CPU `max` finds the same index faster in bfloat16."""
    return logits_BV.max(dim=-1).indices


def _judge(logits_LV: torch.Tensor, answer: Tokens) -> Likelihood:
    """Return the likelihood of an answer whose tokens the last rows of the logits predict."""
    asked = logits_LV[-len(answer) :].float()
    ids = torch.tensor(answer, device=asked.device)
    total = asked.gather(1, ids[:, None]).squeeze(1) - asked.logsumexp(dim=-1)
    return Likelihood(float(total.sum()), bool((asked.argmax(dim=-1) == ids).all()))
