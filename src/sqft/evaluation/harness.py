"""Scoring with lm-eval: a task's examples become an lm-eval task, a model of ours an lm-eval model.

The examples are handed over as a data set in memory (lm-eval's `custom_dataset`), so that lm-eval judges and
aggregates, and the wording stays where training takes it from. Not as a JSON file: the reader turns a prompt such as
2024-02-29T00:00:00 into a date, and back into another text, even where the column's type is given. What stands between
the two:
- tokens are those of training (:func:`sqft.data.encode.encode`), not lm-eval's own split of prompt and answer.
- the model is run by :mod:`sqft.evaluation.decoding`, which is faster than lm-eval's own loop and answers the same; one
  with a recurrent state, or that counts padding as a position, by lm-eval's own.
- as in lm-eval a prompt that exceeds the model's context is shortened from the left; how many were is logged.
- the answer of an `exact` task is scored with the end token after it: an answer that goes on is a wrong answer.
- lm-eval's log and progress bars are silent but for one bar in a terminal. Nothing is fetched, nothing is reported to
  anyone, nothing is written to disk.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqft.data.encode import check_examples, encode, encode_prompt
from sqft.data.tasks import Example, Task, final_number, same_number
from sqft.errors import InputError
from sqft.evaluation.attention import pads_freely
from sqft.evaluation.decoding import generate, likelihoods
from sqft.model.load import embedding_rows
from sqft.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LM_EVAL_SEED = 1234  # of worked examples, where its command is given none
_NAMES = {"choice": "acc", "generate": "number_match", "exact": "exact_match"}
_NOISY = ("lm_eval", "datasets", "transformers")


@dataclass(frozen=True)
class Scores:
    """What lm-eval found.

    Attributes:
        metric: acc, number_match or exact_match.
        value: mean over the examples.
        stderr: standard error of that mean; None for fewer than two examples.
        correct: per example, in order.
        others: further means over the same examples (acc_norm).
    """

    metric: str
    value: float
    stderr: float | None
    correct: list[bool]
    others: Mapping[str, float]


def score_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], batch: int
) -> list[bool]:
    """Return for each example whether the model answers it right.

    Args:
        model: causal language model, scored on the device and in the dtype that it has.
        tokenizer: the model's.
        task: whose metric judges.
        examples: at least one.
        batch: sequences at a time.
    """
    return evaluate_examples(model, tokenizer, task, examples, batch).correct


def evaluate_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    batch: int,
    shots: Sequence[Example] = (),
    fewshot: int = 0,
    seed: int = 0,
) -> Scores:
    """Score examples through lm-eval.

    Args:
        model: causal language model, scored on the device and in the dtype that it has.
        tokenizer: the model's.
        task: whose metric judges.
        examples: at least one.
        batch: sequences at a time.
        shots: what worked examples are drawn from, the training rows in their order.
        fewshot: how many stand before each question, drawn anew for each, as lm-eval does.
        seed: of the draw; with 0 it is the one that lm-eval's command makes.

    Raises:
        InputError: there is no example, or the tokenizer lacks the end token that an `exact` answer needs.
    """
    if not examples:
        raise InputError(f"task {task.name}: there are no rows to evaluate")
    if task.metric == "exact" and tokenizer.eos_token is None:
        raise InputError(f"task {task.name}: the tokenizer has no end token, so no answer can end; set its eos_token")
    check_examples(tokenizer, [*examples, *shots], embedding_rows(model), f"task {task.name}")
    was_training = model.training
    with _quiet():
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate

        lm = _language_model()(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        lm_task = ConfigurableTask(config=_task_config(task, examples, shots, fewshot, tokenizer.eos_token or ""))
        lm_task.set_fewshot_seed(_LM_EVAL_SEED + seed)
        results = evaluate(lm, {"tasks": {"task": lm_task}, "groups": {}})
    model.train(was_training)
    if lm.shortened:
        logger.warning(
            "%s: %d of its sequences exceed the model's %d tokens; the beginning of their prompts is cut off",
            task.name,
            lm.shortened,
            lm.max_length,
        )
    return _scores(task, results)


def _scores(task: Task, results: Mapping[str, Any]) -> Scores:
    name = _NAMES[task.metric]
    key = "acc" if task.metric == "choice" else name
    means = results["results"]["task"]
    samples = sorted(results["samples"]["task"], key=lambda sample: int(sample["doc_id"]))
    stderr = means[f"{key}_stderr,none"]
    return Scores(
        metric=name,
        value=float(means[f"{key},none"]),
        stderr=None if stderr == "N/A" else float(stderr),
        correct=[bool(sample[key]) for sample in samples],
        others={"acc_norm": float(means["acc_norm,none"])} if "acc_norm,none" in means else {},
    )


def _task_config(
    task: Task, examples: Sequence[Example], shots: Sequence[Example], fewshot: int, end: str
) -> dict[str, Any]:
    """Return lm-eval's configuration of the task, with its rows."""
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    # Named types: a column that is empty in all rows, as choices may be, has none of its own.
    features = Features({"prompt": text, "answer": text, "target": text, "choices": List(text), "gold": Value("int64")})
    rows = Dataset.from_list([_row(example, end) for example in examples], features=features)
    config: dict[str, Any] = {
        "task": "task",
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "num_fewshot": fewshot,
        "metadata": {"version": task.version},
        **_judgement(task, examples[0]),
    }
    if fewshot:
        # Without an end token, which stands after the answer that is scored and not inside the prompt.
        config["fewshot_config"] = {"samples": [_row(shot, "") for shot in shots]}
    return config


def _row(example: Example, end: str) -> dict[str, Any]:
    """Return an example's columns; lm-eval puts the space between contexts and what they share."""
    answer = example.answer.removeprefix(" ") if example.contexts else example.answer
    choices = example.contexts or example.choices
    gold = -1 if example.gold is None else example.gold
    return {
        "prompt": example.prompt,
        "answer": answer,
        # Once: an answer's own text may end with it.
        "target": example.answer.removesuffix(end) + end,
        "choices": list(choices),
        "gold": gold,
    }


def _judgement(task: Task, first: Example) -> dict[str, Any]:
    """Return the part of lm-eval's configuration that asks and judges."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    if task.metric == "choice":
        metrics = [{"metric": "acc", **mean}] + ([{"metric": "acc_norm", **mean}] if task.acc_norm else [])
        if first.contexts:
            # lm-eval swaps the roles: the text is the index of the right one, the target is shared.
            return {
                "output_type": "multiple_choice",
                "doc_to_text": "gold",
                "doc_to_target": "answer",
                "doc_to_choice": "choices",
                "target_delimiter": " ",
                "metric_list": metrics,
            }

        def choose(row: Mapping[str, Any], responses: Sequence[tuple[float, bool]]) -> dict[str, int]:
            totals = [total for total, _ in responses]
            by_length = [
                total / len(choice.removeprefix(" ")) for total, choice in zip(totals, row["choices"], strict=True)
            ]
            found = {"acc": int(totals.index(max(totals)) == row["gold"])}
            if task.acc_norm:
                found["acc_norm"] = int(by_length.index(max(by_length)) == row["gold"])
            return found

        # Choices bring their own spaces, row by row: lm-eval knows one delimiter a task, and counts its length if told.
        return {
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "process_results": choose,
            "metric_list": metrics,
        }
    if task.metric == "exact":

        def exact(_row: Mapping[str, Any], responses: Sequence[tuple[float, bool]]) -> dict[str, int]:
            return {"exact_match": int(responses[0][1])}

        return {
            "output_type": "loglikelihood",
            "doc_to_text": "prompt",
            "doc_to_target": "target",
            "target_delimiter": "",
            "process_results": exact,
            "metric_list": [{"metric": "exact_match", **mean}],
        }

    def number(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, int]:
        right = final_number(row["answer"], task.marker)
        return {"number_match": int(same_number(final_number(responses[0], task.marker), right))}

    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "generation_kwargs": {"until": list(task.until), "max_gen_toks": task.max_new_tokens, "do_sample": False},
        "process_results": number,
        "metric_list": [{"metric": "number_match", **mean}],
    }


@functools.cache
def _language_model() -> type[Any]:
    """Return the lm-eval model; made on first use, because importing lm-eval takes seconds."""
    from lm_eval.models.huggingface import HFLM

    class TrainedTokens(HFLM):  # type: ignore[misc]
        """lm-eval's Hugging Face model with training's tokens and our decoding; counts what it has to shorten."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.shortened = 0
            self.ours = pads_freely(self.model)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return encode(self.tokenizer, context, continuation)

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[Any, Any]:
            rows = [encode_prompt(self.tokenizer, string) for string in strings]
            kept = max(map(len, rows)) if left_truncate_len is None else left_truncate_len
            padded = self.tokenizer.pad(
                {"input_ids": [row[-kept:] for row in rows]}, padding_side=padding_side, return_tensors="pt"
            )
            return padded["input_ids"], padded["attention_mask"]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            if not self.ours:
                return super().loglikelihood(requests, disable_tqdm=True)
            rows: dict[int, list[int]] = {}
            pairs = []
            for place, request in enumerate(requests):
                rows.setdefault(request.doc_id, []).append(place)
                pairs.append(self._fit(*self._encode_pair(*request.args)))
            with progress(len(requests), "scoring", "answer") as advance:
                groups = [[pairs[place] for place in places] for places in rows.values()]
                found = likelihoods(self.model, groups, self.batch_size, advance)
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for places, values in zip(rows.values(), found, strict=True):
                for place, value in zip(places, values, strict=True):
                    answers[place] = (value.total, value.greedy)
            return answers

        def _fit(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
            excess = len(prompt) + len(answer) - 1 - self.max_length
            if excess <= 0:
                return prompt, answer
            if excess >= len(prompt):
                raise InputError(
                    f"an answer of {len(answer)} tokens leaves no room for its prompt in the model's {self.max_length}"
                )
            self.shortened += 1
            return prompt[excess:], answer

        def _end_tokens(self) -> set[int]:
            """Return the ids that end an answer: the tokenizer's, and those of the model's generation settings."""
            own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
            listed = own if isinstance(own, list) else [own]
            return {int(token) for token in (self.eot_token_id, *listed) if token is not None}

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
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
            return [_cut(text, stops) for text in texts]

    return TrainedTokens


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' log and bars inside the block, and leave them as they were."""
    import datasets
    import lm_eval.api.task as lm_eval_task

    levels = {name: logging.getLogger(name).level for name in _NOISY}
    bars = datasets.are_progress_bars_disabled()
    tqdm = lm_eval_task.tqdm
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # lm-eval's bar over the building of prompts has no switch.
    lm_eval_task.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
