"""A task of ours as lm-eval's configuration: rows in memory, prompts, and metric.

Rows are handed over as a data set in memory (lm-eval's `custom_dataset`). A JSON file would not do: the reader turns a
prompt such as 2024-02-29T00:00:00 into a date, and back into another text, even where the column's type is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqft.data.numbers import final_number, same_number

if TYPE_CHECKING:
    from sqft.data.tasks import Example, Task

_MEAN = {"aggregation": "mean", "higher_is_better": True}


def task_config(
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
    if task.metric == "choice":
        return _shared_continuation(task) if first.contexts else _choice(task)
    return _exact() if task.metric == "exact" else _number(task)


def _accuracies(task: Task) -> list[dict[str, Any]]:
    return [{"metric": name, **_MEAN} for name in (["acc", "acc_norm"] if task.acc_norm else ["acc"])]


def _shared_continuation(task: Task) -> dict[str, Any]:
    """Choices are contexts of one continuation; lm-eval swaps the roles: the text is the index of the right one."""
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "target_delimiter": " ",
        "metric_list": _accuracies(task),
    }


def _choice(task: Task) -> dict[str, Any]:
    """Choices include their own spaces: lm-eval has one delimiter per task, and would count its length in acc_norm."""

    def choose(row: Mapping[str, Any], responses: Sequence[tuple[float, bool]]) -> dict[str, int]:
        totals = [total for total, _ in responses]
        by_length = [
            total / len(choice.removeprefix(" ")) for total, choice in zip(totals, row["choices"], strict=True)
        ]
        found = {"acc": int(totals.index(max(totals)) == row["gold"])}
        if task.acc_norm:
            found["acc_norm"] = int(by_length.index(max(by_length)) == row["gold"])
        return found

    return {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "process_results": choose,
        "metric_list": _accuracies(task),
    }


def _exact() -> dict[str, Any]:
    def exact(_row: Mapping[str, Any], responses: Sequence[tuple[float, bool]]) -> dict[str, int]:
        return {"exact_match": int(responses[0][1])}

    return {
        "output_type": "loglikelihood",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "target_delimiter": "",
        "process_results": exact,
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    }


def _number(task: Task) -> dict[str, Any]:
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
        "metric_list": [{"metric": "number_match", **_MEAN}],
    }
