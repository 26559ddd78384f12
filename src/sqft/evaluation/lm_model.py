"""lm-eval's Hugging Face model, with our tokenisation and our decoding.

This module imports lm-eval, which takes seconds: import it where an evaluation begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from sqft.data.encode import encode, encode_prompt
from sqft.errors import InputError
from sqft.evaluation.attention import pads_freely
from sqft.evaluation.decoding import generate, likelihoods
from sqft.evaluation.reader import fit
from sqft.progress import progress


class TrainedTokens(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model with training's tokens and our decoding.

    Attributes:
        shortened: the number of prompts that were truncated.
        answers: for each row the (prompt, answer) token ids to score beside its choices, or none.
        totals: their log-likelihoods, once choices were scored by our decoding; else None.
    """

    def __init__(self, answers: Sequence[tuple[list[int], list[int]]] = (), **options: Any) -> None:
        super().__init__(**options)
        self.shortened = 0
        self.ours = pads_freely(self.model)
        self.answers = answers
        self.totals: list[float] | None = None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode(self.tokenizer, context, continuation)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Any, Any]:
        """Return (ids, mask) of prompts, padded and truncated from the left."""
        rows = [encode_prompt(self.tokenizer, string) for string in strings]
        kept = max(map(len, rows)) if left_truncate_len is None else left_truncate_len
        padded = self.tokenizer.pad(
            {"input_ids": [row[-kept:] for row in rows]}, padding_side=padding_side, return_tensors="pt"
        )
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return (log-likelihood, is greedy) of each request's answer."""
        if not self.ours:
            return super().loglikelihood(requests, disable_tqdm=True)
        rows: dict[int, list[int]] = {}
        pairs = []
        for place, request in enumerate(requests):
            rows.setdefault(request.doc_id, []).append(place)
            pairs.append(self._fit(*self._encode_pair(*request.args)))
        with progress(len(requests) + len(self.answers), "scoring", "answer") as advance:
            groups = [[pairs[place] for place in places] for places in rows.values()]
            if self.answers:  # a row's own answer begins as its choices do
                groups = [[*group, self.answers[row]] for row, group in zip(rows, groups, strict=True)]
            found = likelihoods(self.model, groups, self.batch_size, advance)
        if self.answers:
            own = {row: values.pop().total for row, values in zip(rows, found, strict=True)}
            self.totals = [own[row] for row in range(len(self.answers))]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for places, values in zip(rows.values(), found, strict=True):
            for place, value in zip(places, values, strict=True):
                answers[place] = (value.total, value.greedy)
        return answers

    def _fit(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        kept, answer = fit(prompt, answer, self.max_length)
        self.shortened += len(kept) < len(prompt)
        return kept, answer

    def _end_tokens(self) -> set[int]:
        """Return the ids that end an answer: the tokenizer's, and those of the model's generation settings."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        return {int(token) for token in (self.eot_token_id, *listed) if token is not None}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Return the generated text for each request, up to a stop string."""
        if not self.ours:
            return super().generate_until(requests, disable_tqdm=True)
        # All requests are of one task, and so are their options.
        options = requests[0].args[1]
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise InputError(
                f"the model's {self.max_length} tokens leave no room for a prompt beside an answer of up to "
                f"{options['max_gen_toks']}"
            )
        prompts = [encode_prompt(self.tokenizer, request.args[0]) for request in requests]
        self.shortened += sum(len(prompt) > room for prompt in prompts)
        stops = options["until"]
        # A stop of n bytes lies within its last n tokens and the one that it begins in.
        window = max((len(stop.encode()) for stop in stops), default=0) + 1

        ends = self._end_tokens()

        def ended(tokens: Sequence[int]) -> bool:
            if tokens[-1] in ends:
                return True
            recent = self.tokenizer.decode(tokens[-window:]) if stops else ""
            return any(stop in recent for stop in stops)

        with progress(len(requests), "generating", "answer") as advance:
            found = generate(
                self.model,
                [prompt[-room:] for prompt in prompts],
                options["max_gen_toks"],
                self.batch_size,
                ended,
                advance,
            )
        texts = [
            self.tokenizer.decode([token for token in tokens if token not in ends], skip_special_tokens=True)
            for tokens in found
        ]
        return [cut_at(text, stops) for text in texts]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
