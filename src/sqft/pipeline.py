"""The whole flow on one screen: dense → sparse → INT4 → super-adapter → sub-adapter → merged → verified → evaluated.

Each stage writes a folder (or a JSON file) under the run's folder and is skipped when it is already there with the same
settings and inputs, so a run that was interrupted continues by the same command. Everything that can be checked without
work is checked before the first stage.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqft import processes
from sqft.data.calibration import calibration_tokens
from sqft.data.chat import uses_clock, with_date
from sqft.data.load import folds_punctuation, load_examples, load_tasks
from sqft.data.tasks import question_key
from sqft.disk import read_json, write_json
from sqft.errors import InputError, Problems, SqftError
from sqft.locks import run_lock
from sqft.model.opening import load_tokenizer
from sqft.model.sources import local_folder
from sqft.model.targets import find_targets, skeleton
from sqft.recipe import SparsifyConfig
from sqft.stages import evaluate, finetune, merge, quantize, report, search, sparsify, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sqft.data.tasks import Example, Task
    from sqft.recipe import CalibrationConfig, Recipe

logger = logging.getLogger(__name__)

BEGAN = ".began"


@dataclass(frozen=True)
class RunResult:
    """Where a run left its results.

    Attributes:
        out: the run's folder.
        report: report.html.
        verified: whether the merged model passed; None when nothing was merged.
    """

    out: Path
    report: Path
    verified: bool | None


def run(recipe: Recipe, out: Path | None = None, announce: Callable[[str], None] = logger.info) -> RunResult:
    """Take a recipe through all its stages.

    Args:
        recipe: what to do.
        out: the run's folder; None is runs/NAME.
        announce: told the name of each stage as it begins.

    Raises:
        InputError: something of the recipe, model or data cannot be used; before any work, and all at once where it can
            be.

    Several processes (`torchrun`) share the training. The first does all else: the others wait until there is what is
    trained on, and are done when the training is.
    """
    if processes.count() > 1 and recipe.finetune is None:
        raise InputError(
            f"recipe {recipe.name} trains nothing that {processes.count()} processes could share; start one"
        )
    out = Path("runs") / recipe.name if out is None else out
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with run_lock(out) if processes.first() else nullcontext():
        if not processes.first():
            processes.meet()
        announce("reading model and data")
        dense = local_folder(recipe.model, out, recipe.revision)
        recipe = dated(recipe, dense, out)
        inputs = _prepare(recipe, dense)
        base = dense
        models: dict[str, tuple[Path, Path | None]] = {"dense": (dense, None)}
        common: dict[str, Any] = {"seed": recipe.seed, "trust_remote_code": recipe.trust_remote_code}
        verified = None

        if recipe.sparsify is not None and not recipe.joint:
            announce("sparsify")
            drawn = None if inputs.tokens is None else inputs.source
            sparsify.run(recipe.sparsify, dense, inputs.tokens, out / "sparse", calibration=drawn, **common)
            base = out / "sparse"
            models["sparse"] = (base, None)

        if recipe.quantize is not None:
            announce("sparsify and quantize" if recipe.joint else "quantize")
            drawn = None if inputs.quantize_tokens is None else inputs.source
            quantize.run(
                recipe.quantize, base, inputs.quantize_tokens, out / "quantized",
                sparsify=recipe.sparsify if recipe.joint else None, calibration=drawn, **common,
            )  # fmt: skip
            base = out / "quantized"
            models["quantized"] = (base, None)

        if recipe.finetune is not None:
            announce("finetune")
            train = [(e.prompt, e.answer) for e in inputs.train]
            validation = [(e.prompt, e.answer) for e in inputs.validation]
            seeded = common | ({} if recipe.finetune.seed is None else {"seed": recipe.finetune.seed})
            if processes.first():
                processes.meet()
            finetune.run(recipe.finetune, base, train, validation, out / "adapter", data=inputs.source, **seeded)
            if not processes.first():
                return RunResult(out, out / "report.html", None)
            processes.go_on_alone()
            announce("search for a sub-adapter" if recipe.search.searches else "extract the sub-adapter")
            search.run(
                recipe.search, out / "adapter", out / "sub_adapter", base=base, rows=inputs.selection, **common
            )  # fmt: skip
            models["tuned"] = (base, out / "sub_adapter")

        if recipe.finetune is not None and recipe.merge is not None:
            announce("merge")
            merge.run(recipe.merge, base, out / "sub_adapter", out / "merged", **common)
            models["merged"] = (out / "merged", None)
            if recipe.verify is not None:
                announce("verify")
                held_out = inputs.test[: max(recipe.verify.prompts, recipe.verify.accuracy_rows)]
                proof = verify.run(
                    recipe.verify, out / "merged", base, out / "sub_adapter", out / "verify.json",
                    task=inputs.task, examples=held_out, **common,
                )  # fmt: skip
                verified = bool(proof["passed"])
                _tell(proof["checks"])

        if recipe.evaluate is not None:
            results: dict[str, dict[str, Any]] = {}
            for row in recipe.evaluate.rows:
                if row not in models:
                    continue
                announce(f"evaluate {row}")
                model, adapter = models[row]
                file = out / "evaluations" / f"{row}.json"
                results[row] = evaluate.run(recipe.evaluate, recipe.data, model, adapter, file, **common)
            _write_summary(out, results, recipe.seed)

        announce("report")
        return RunResult(out, report.run(out, recipe), verified)


def dated(recipe: Recipe, dense: Path, out: Path) -> Recipe:
    """Return the recipe with the date that its chats are told: the moment at which the run in `out` first began.

    A chat template that asks for the date would else ask other questions tomorrow, and in two stages of one run.

    Args:
        recipe: the recipe.
        dense: the model's folder, whose tokenizer has the template.
        out: the run's folder; the moment is kept there, in `.began`.
    """
    tokenizer = load_tokenizer(dense, trust_remote_code=recipe.trust_remote_code)
    if not uses_clock(tokenizer):
        return recipe
    file = out / BEGAN
    if not file.is_file():
        write_json(file, {"moment": datetime.now().isoformat(timespec="seconds")})
    moment = datetime.fromisoformat(read_json(file)["moment"])
    return recipe.model_copy(update={"data": with_date(recipe.data, tokenizer, moment)})


@dataclass(frozen=True)
class _Inputs:
    """What the stages read, loaded and checked before the first of them."""

    tokens: torch.Tensor | None
    quantize_tokens: torch.Tensor | None
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    task: Task | None
    selection: list[tuple[Task, list[Example]]]
    source: dict[str, Any]


def _prepare(recipe: Recipe, dense: Path) -> _Inputs:
    """Load data and check everything that needs no work, so that a bad recipe costs nothing."""
    tokenizer = load_tokenizer(dense, trust_remote_code=recipe.trust_remote_code)
    tokens: torch.Tensor | None = None
    quantize_tokens: torch.Tensor | None = None
    train: list[Example] = []
    validation: list[Example] = []
    test: list[tuple[Task, list[Example]]] = []
    selection: list[tuple[Task, list[Example]]] = []
    reported: dict[str, evaluate.Reading] = {}
    with Problems(f"recipe {recipe.name}") as problems:

        def attempt(action: Callable[[], Any]) -> Any:
            try:
                return action()
            except SqftError as error:
                problems.add(str(error))
                return None

        if recipe.finetune is not None:
            train = attempt(lambda: load_examples(recipe.data, "train", recipe.seed, tokenizer)) or []
            if recipe.finetune.evaluate_every is not None:
                validation = attempt(lambda: load_examples(recipe.data, "validation", recipe.seed, tokenizer)) or []
        merges = recipe.finetune is not None and recipe.merge is not None
        if recipe.evaluate is not None or (merges and recipe.verify is not None):
            test = attempt(lambda: load_tasks(recipe.data, "test", tokenizer)) or []
        if recipe.evaluate is not None:
            for name in attempt(partial(evaluate.task_names, recipe.evaluate, recipe.data)) or []:
                read = partial(evaluate.read_rows, name, recipe.evaluate, recipe.data, tokenizer, recipe.seed)
                if found := attempt(read):
                    reported[name] = found
        if recipe.finetune is not None and recipe.search.searches:
            selection = attempt(lambda: load_tasks(recipe.data, "validation", tokenizer)) or []
        attempt(lambda: report.check_baselines(recipe))
        network = attempt(lambda: skeleton(dense, trust_remote_code=recipe.trust_remote_code))
        if recipe.sparsify is not None:
            settings = recipe.sparsify
            if settings.needs_text:
                tokens = attempt(lambda: calibration_tokens(settings.calibration, recipe.data, tokenizer, recipe.seed))
            if network is not None:
                attempt(
                    lambda: sparsify.check(
                        settings, network, find_targets(network, settings.targets, settings.ignore)[0], tokens
                    )
                )
        if recipe.quantize is not None:
            grid = recipe.quantize
            quantize_tokens = attempt(lambda: _quantize_tokens(recipe, tokens, tokenizer))
            if network is not None:
                attempt(
                    lambda: quantize.check(
                        grid,
                        dense,
                        network,
                        find_targets(network, grid.targets, grid.ignore)[0],
                        quantize_tokens,
                        recipe.sparsify if recipe.joint else None,
                    )
                )
        if recipe.finetune is not None and network is not None:
            tuned = recipe.finetune
            attempt(lambda: finetune.check(tuned, network))
            attempt(lambda: finetune.check_base(tuned, dense, quantised_first=recipe.quantize is not None))
            if recipe.quantize is not None and tuned.kind == "quantized":
                attempt(lambda: _check_quantised_targets(recipe, network))
            if train:
                attempt(lambda: finetune.label(tuned, tokenizer, [(e.prompt, e.answer) for e in train], network.config))
        tuned_on = train
        if recipe.finetune is None and _calibrates_on_task(recipe, tokens, quantize_tokens):
            tuned_on = attempt(lambda: load_examples(recipe.data, "train", recipe.seed, tokenizer)) or []
        for message in _leaks(recipe, tuned_on, selection, reported):
            problems.add(message)
    source = {"data": recipe.data.model_dump(mode="json")}
    # The proof's behaviour checks ask the first task's questions.
    task, held_out = test[0] if test else (None, [])
    return _Inputs(tokens, quantize_tokens, train, validation, held_out, task, selection, source)


def _leaks(
    recipe: Recipe,
    train: Sequence[Example],
    selection: Sequence[tuple[Task, list[Example]]],
    reported: Mapping[str, evaluate.Reading],
) -> Iterator[str]:
    """Say which reported questions a model would be tuned or calibrated or selected on.

    The loader keeps the splits of the recipe's own data apart; other tasks that are evaluated are compared here.
    """
    selected = [example for _, part in selection for example in part]
    if not train and not selected:
        return
    for name, (task, rows, _) in reported.items():
        # Punctuation counts if it does for either side.
        fold = task.fold_punctuation and folds_punctuation(recipe.data)
        asked = {question_key(example, punctuation=fold) for example in rows}
        if shared := sum(question_key(example, punctuation=fold) in asked for example in train):
            yield (
                f"{shared} of the {len(train)} training rows ask what evaluate.tasks {name} reports; take them out, or "
                "report other rows (a mix of built-in tasks, such as arc_easy+arc_challenge, takes them out itself)"
            )
        if shared := sum(question_key(example, punctuation=fold) in asked for example in selected):
            yield (
                f"search selects on {shared} questions that evaluate.tasks {name} reports; evaluate other rows, or "
                "choose a strategy that evaluates nothing, such as heuristic"
            )


def _calibrates_on_task(recipe: Recipe, tokens: torch.Tensor | None, quantize_tokens: torch.Tensor | None) -> bool:
    """Tell whether calibration text was drawn from the training rows."""
    pruned = tokens is not None and recipe.sparsify is not None and recipe.sparsify.calibration.data == "task"
    return pruned or (quantize_tokens is not None and _quantize_calibration(recipe).data == "task")


def _check_quantised_targets(recipe: Recipe, network: PreTrainedModel) -> None:
    """Refuse quantisation-aware adapters on linears that the recipe leaves in floating point."""
    assert recipe.quantize is not None
    assert recipe.finetune is not None
    left = find_targets(network, recipe.quantize.targets, recipe.quantize.ignore)[1]
    for module in recipe.finetune.target_modules:
        found = [name for name in left if name == module or name.endswith(f".{module}")]
        if found:
            raise InputError(
                f"finetune.target_modules has {module}, but quantize leaves {len(found)} such linears float "
                f"({found[0]}); quantise them too, or leave them out of target_modules"
            )


def _quantize_tokens(recipe: Recipe, tokens: torch.Tensor | None, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the calibration tokens of `quantize`: its own, else sparsify's; None where it needs none."""
    assert recipe.quantize is not None
    if recipe.quantize.method == "rtn" and not recipe.joint:
        return None
    if recipe.quantize.calibration is None and tokens is not None:
        return tokens
    if recipe.quantize.method == "rtn":
        return None
    return calibration_tokens(_quantize_calibration(recipe), recipe.data, tokenizer, recipe.seed)


def _quantize_calibration(recipe: Recipe) -> CalibrationConfig:
    own = None if recipe.quantize is None else recipe.quantize.calibration
    return own or (recipe.sparsify or SparsifyConfig()).calibration


def _tell(checks: list[dict[str, Any]]) -> None:
    """Say what the proof found."""
    failed = [check for check in checks if not check["passed"]]
    for check in failed:
        logger.error("%s: %g, bound %g; %s", check["name"], check["value"], check["bound"], check["detail"])
    if not failed:
        logger.info("all %d checks hold: %s", len(checks), ", ".join(check["name"] for check in checks))


def _write_summary(out: Path, results: dict[str, dict[str, Any]], seed: int) -> None:
    """Write eval.json: the result of the model furthest along the flow in the stable form, with all rows beside it."""
    if not results:
        return
    final = next(row for row in ("merged", "tuned", "quantized", "sparse", "dense") if row in results)
    rows = {row: result["tasks"] for row, result in results.items()}
    write_json(
        out / "eval.json",
        {"model": final, "tasks": rows[final], "seed": seed, "versions": results[final]["versions"], "rows": rows},
    )
