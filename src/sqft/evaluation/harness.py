"""Scores of examples by lm-eval, which computes and aggregates the metrics.

:mod:`sqft.evaluation.lm_task` wraps a task's examples as an lm-eval task, :mod:`sqft.evaluation.lm_model` a model as an
lm-eval model. Differences from lm-eval's own command:
- tokens are those of training (:func:`sqft.data.encode.encode`), not lm-eval's split of prompt and answer.
- :mod:`sqft.evaluation.decoding` runs the model: faster, same answers. A model with a recurrent state, or one that
  counts padding as a position, runs in lm-eval's own loop.
- the answer of an `exact` task is scored with the EOS token after it: an answer that continues is wrong.
- logs and progress bars are silent except for one bar in a terminal; nothing is downloaded or written to disk.
A prompt longer than the model's context is truncated from the left, as in lm-eval; the number of them is logged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqft.data.encode import check_examples
from sqft.errors import InputError
from sqft.evaluation.lm_task import task_config
from sqft.model.load import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sqft.data.tasks import Example, Task
    from sqft.evaluation.likelihood import Pair

logger = logging.getLogger(__name__)

_LM_EVAL_SEED = 1234  # default few-shot seed of its command
_NAMES = {"choice": "acc", "generate": "number_match", "exact": "exact_match"}
_NOISY = ("lm_eval", "datasets", "transformers")


@dataclass(frozen=True)
class Scores:
    """lm-eval's results.

    Attributes:
        metric: acc, number_match or exact_match.
        value: mean over the examples.
        stderr: standard error of that mean; None for fewer than two examples.
        correct: per example, in order.
        others: other metrics over the same examples (acc_norm).
        totals: log-likelihoods of the answers that were to be scored besides; None where they were not.
    """

    metric: str
    value: float
    stderr: float | None
    correct: list[bool]
    others: Mapping[str, float]
    totals: list[float] | None


def score_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], batch: int
) -> list[bool]:
    """Return for each example whether the model's answer is right.

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
    answers: Sequence[Pair] = (),
) -> Scores:
    """Score examples through lm-eval.

    Args:
        model: causal language model, scored on the device and in the dtype that it has.
        tokenizer: the model's.
        task: whose metric judges.
        examples: at least one.
        batch: sequences at a time.
        shots: the pool of few-shot examples: the training rows in order.
        fewshot: number of few-shot examples, sampled for each question as in lm-eval.
        seed: of the sampling; 0 gives the same examples as lm-eval's command.
        answers: one for each example, scored with its choices where it has any: their prompt is read once.

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

        lm = _language_model()(pretrained=model, tokenizer=tokenizer, batch_size=batch, answers=answers)
        lm_task = ConfigurableTask(config=task_config(task, examples, shots, fewshot, tokenizer.eos_token or ""))
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
    return _scores(task, results, lm.totals)


def _scores(task: Task, results: Mapping[str, Any], totals: list[float] | None) -> Scores:
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
        totals=totals,
    )


def _language_model() -> type[Any]:
    """Return the lm-eval model; importing it takes seconds."""
    from sqft.evaluation.lm_model import TrainedTokens

    return TrainedTokens


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' logs and progress bars inside the block, and restore them afterwards."""
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
