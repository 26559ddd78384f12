"""Stage `evaluate`: one model on the reported rows of its tasks, through lm-eval.

Reported are the test splits (of BoolQ, PIQA, HellaSwag and WinoGrande the validation split, as everywhere); nothing is
tuned, selected or calibrated on them. All data is read before the model is, so that a missing split costs no loading.
A result file that was made with the same settings, model, adapter and data is returned as it is.

eval.json: {tasks: {name: {metric, value, stderr, n, version, correct, ...}}, seed, fewshot, cost, versions, made_from}.
`correct` has a 1 or a 0 for each row. Beside these a task has acc_norm where lm-eval has it, and for MAWPS
`mawps_unseen` {value, stderr, n}: the rows whose wording, numbers aside, stands in no other split. Without worked
examples it has `<task>_nll` {metric, value, stderr, n, tokens, rows}: see :mod:`sqft.evaluation.likelihood`. `cost` is
{seconds, peak_memory_bytes} of the whole, loading the model included, and `answering` {task: seconds} of its rows.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights
from sqft.adapters.saved import SavedAdapter
from sqft.data.chat import as_chat
from sqft.data.load import member_configs
from sqft.data.taskfile import is_task_file
from sqft.data.tasks import BUILTIN, PERPLEXITY, Example, Task, judged_digest, question_key
from sqft.device import device_key, place
from sqft.disk import local_path
from sqft.errors import InputError, Problems
from sqft.memory import costing
from sqft.recipe import DataConfig
from sqft.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqft.context import Context
    from sqft.data.load import Data
    from sqft.evaluation.harness import Scores
    from sqft.recipe import EvaluateConfig

logger = logging.getLogger(__name__)

# Task, reported rows and worked examples.
Reading: TypeAlias = "tuple[Task, list[Example], list[Example]]"


def run(
    config: EvaluateConfig,
    data: DataConfig,
    model_dir: Path,
    adapter: Path | None,
    out_file: Path,
    context: Context,
) -> dict[str, Any]:
    """Evaluate a model, with an unmerged adapter if one is given, and write the result.

    Args:
        config: which tasks and how.
        data: the recipe's data; its task is the default.
        model_dir: model folder.
        adapter: adapter folder or None.
        out_file: the JSON file to write.
        context: its seed chooses the worked examples of few-shot prompts.

    Returns:
        The result, as in the file.

    Raises:
        InputError: data or model cannot be used, or the file was made with other settings.
    """
    if adapter is not None:
        SavedAdapter.open(adapter)  # all that is wrong with it, before any data is read
    inputs = {"model": model_dir} | ({"adapter": adapter} if adapter is not None else {})
    read = context.data(model_dir)
    rows = read_all(config, data, read, context.seed)
    # `rows` and `baselines` say which evaluations a run makes and shows, `batch` what they hold in memory at a time.
    settings = {
        "evaluate": config.model_dump(mode="json", exclude={"rows", "baselines", "batch"}),
        "data": data.model_dump(mode="json"),
        "data_digest": {name: judged_digest(task, [*shots, *part]) for name, (task, part, shots) in rows.items()},
        **device_key(context.device),
    }

    def work() -> dict[str, Any]:
        with costing() as cost:
            results, answering = _evaluate_all(rows, config, model_dir, adapter, context)
        cost["answering"] = answering
        return {"tasks": results, "seed": context.seed, "fewshot": config.fewshot, "cost": cost}

    return Stage.of("evaluate", out_file, settings, inputs, context.seed).record(work)


def _task_data(name: str, data: DataConfig) -> DataConfig:
    """Return the data of a task to evaluate: the recipe's own, a built-in one, or rows that read as the recipe's."""
    if name == data.task:
        return data
    if name in (member.task for member in member_configs(data)):
        return data.model_copy(update={"task": name})
    own = name not in BUILTIN and not is_task_file(name)
    return DataConfig(
        task=name, template=data.template if own else None, chat_template=data.chat_template, date=data.date
    )


def task_names(config: EvaluateConfig, data: DataConfig) -> list[str]:
    """Return the tasks to evaluate: those that are named, else the data's own."""
    return config.tasks or [member.task for member in member_configs(data)]


def read_all(config: EvaluateConfig, data: DataConfig, read: Data, seed: int) -> dict[str, Reading]:
    """Return what evaluating each task reads, under the names of the results.

    Raises:
        InputError: tasks cannot be read, all of them.
    """
    rows: dict[str, Reading] = {}
    with Problems("evaluate") as problems:
        for name in task_names(config, data):
            try:
                found = read_rows(name, config, data, read, seed)
            except InputError as error:
                problems.add(str(error))
                continue
            task = found[0]
            rows[name if task.name in rows else task.name] = found
    return rows


def read_rows(name: str, config: EvaluateConfig, data: DataConfig, read: Data, seed: int) -> Reading:
    """Return task, reported rows and what worked examples are drawn from; of a text for perplexity no rows.

    Raises:
        InputError: rows are nowhere or malformed, or there are no worked examples to be had.
    """
    if name == PERPLEXITY.name:
        return PERPLEXITY, [], []
    task = read.task(_task_data(name, data))
    examples = read_task(name, data, read)
    shots = _shots(name, task, data, examples, config.fewshot, read, seed) if config.fewshot else []
    return task, examples[: config.limit], shots


def _is_rows_file(name: str, data: DataConfig) -> bool:
    """Return whether a task to evaluate is one file of rows that read as the recipe's own."""
    return name != data.task and name not in BUILTIN and not is_task_file(name) and local_path(name).is_file()


def read_task(name: str, data: DataConfig, read: Data) -> list[Example]:
    """Return the rows that evaluating `name` reports.

    Raises:
        InputError: they are nowhere or malformed.
    """
    if name == PERPLEXITY.name:
        return []
    if _is_rows_file(name, data):
        rows = read.file(local_path(name), data.template, date=data.date, chat_template=data.chat_template)
        return (
            [as_chat(row, read.tokenizer, read.task(data), data.date) for row in rows] if data.chat_template else rows
        )
    return read.examples(_task_data(name, data), "test", 0)


def _shots(
    name: str, task: Task, data: DataConfig, reported: Sequence[Example], count: int, read: Data, seed: int
) -> list[Example]:
    """Return the training rows from which worked examples are drawn, none of them reported."""
    if data.chat_template:
        raise InputError(
            f"evaluate.fewshot is {count} and data.chat_template is set: worked examples would be chats of their own "
            "before the question's; set one of the two off"
        )
    source = data if _is_rows_file(name, data) else _task_data(name, data)
    fold = task.fold_punctuation and read.folds_punctuation(source)
    asked = {question_key(example, punctuation=fold) for example in reported}
    train = [e for e in read.examples(source, "train", seed) if question_key(e, punctuation=fold) not in asked]
    if count > len(train):
        raise InputError(f"evaluate.fewshot is {count}, but {name} has {len(train)} training rows; choose fewer")
    return train


def _evaluate_all(
    rows: dict[str, Reading], config: EvaluateConfig, model_dir: Path, adapter: Path | None, context: Context
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the results and the seconds that answering took, by task."""
    from sqft.evaluation.harness import evaluate_examples
    from sqft.evaluation.likelihood import answer_nll, answer_pairs, log_likelihoods
    from sqft.evaluation.perplexity import perplexity

    tokenizer = context.tokenizer(model_dir)
    model = load_model(model_dir, adapter, trust_remote_code=context.trust_remote_code, device=context.device)
    place(model, context.device, "evaluate on a card with more memory")
    results, answering = {}, {}
    model.eval()
    with cached_weights(model):
        for name, (task, examples, shots) in rows.items():
            started = time.monotonic()
            if task is PERPLEXITY:
                found = perplexity(model, tokenizer, config.limit, context.data(model_dir))
                results[name] = {**found, "version": task.version}
            else:
                drawn = (shots, config.fewshot, context.seed)
                # The likelihood of an answer is that after the question alone.
                pairs = [] if config.fewshot else answer_pairs(model, tokenizer, examples)
                scores = evaluate_examples(model, tokenizer, task, examples, config.batch, *drawn, answers=pairs)
                results[name] = _entry(task, examples, scores)
                if pairs:
                    totals = scores.totals or log_likelihoods(model, pairs, config.batch)
                    results[name][f"{task.name}_nll"] = answer_nll(pairs, totals)
            answering[name] = round(time.monotonic() - started, 2)
            entry = results[name]
            logger.info("%s: %s %.4f on %d rows", name, entry["metric"], entry["value"], entry["n"])
    return results, answering


def _entry(task: Task, examples: Sequence[Example], scores: Scores) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "metric": scores.metric,
        "value": scores.value,
        "stderr": scores.stderr,
        "n": len(scores.correct),
        "version": task.version,
        **scores.others,
        # Which rows are right, in order: what two models are compared by, pair by pair.
        "correct": "".join("1" if correct else "0" for correct in scores.correct),
    }
    for tag in sorted({tag for example in examples for tag in example.tags}):
        part = [correct for example, correct in zip(examples, scores.correct, strict=True) if tag in example.tags]
        entry[f"{task.name}_{tag}"] = _mean(part)
    return entry


def _mean(correct: Sequence[bool]) -> dict[str, Any]:
    """Return mean, standard error (as lm-eval: sample deviation over √n) and number of some rows."""
    n = len(correct)
    mean = sum(correct) / n
    stderr = (mean * (1 - mean) / (n - 1)) ** 0.5 if n > 1 else None
    return {"value": mean, "stderr": stderr, "n": n}
