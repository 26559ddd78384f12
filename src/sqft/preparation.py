"""What a run reads and checks before its first stage, so that a bad recipe costs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.data.tasks import question_key
from sqft.errors import InputError, Problems
from sqft.model.targets import find_targets, skeleton
from sqft.recipe import SparsifyConfig
from sqft.stages import evaluate, finetune, quantize, report, sparsify, teacher
from sqft.storage.archive import stored
from sqft.storage.masks import MASK_FILE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sqft.context import Context
    from sqft.data.load import Data
    from sqft.data.tasks import Example, Task
    from sqft.recipe import CalibrationConfig, FinetuneConfig, Recipe


@dataclass
class Inputs:
    """What the stages of a run read.

    Attributes:
        source: what all rows and calibration text were drawn from; part of the stages' keys.
        tokens: calibration tokens of sparsify, int64 [samples, length].
        quantize_tokens: those of quantize.
        train: training rows.
        validation: rows of the validation loss.
        task: the first task, which judges in the proof.
        test: its held-out rows.
        selection: validation rows of each task, which a search selects on.
    """

    source: dict[str, Any]
    tokens: torch.Tensor | None = None
    quantize_tokens: torch.Tensor | None = None
    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    task: Task | None = None
    test: list[Example] = field(default_factory=list)
    selection: list[tuple[Task, list[Example]]] = field(default_factory=list)


def prepare(recipe: Recipe, context: Context, dense: Path, given: Path | None = None) -> Inputs:
    """Read the data of a run and check everything that needs no work.

    Args:
        recipe: the recipe.
        context: of the run; it keeps what is read.
        dense: the folder of the recipe's model.
        given: the folder of the adapter or tuned model that its section teacher names.

    Raises:
        InputError: all that is wrong with recipe, model and data.
    """
    inputs = Inputs({"data": recipe.data.model_dump(mode="json")})
    tuned = teacher.tuned_folder(recipe.teacher, dense, given)
    with Problems(f"recipe {recipe.name}") as problems:
        problems.attempt(lambda: context.device)
        reported = _read_rows(recipe, context.data(tuned), inputs, problems)
        problems.attempt(lambda: report.check_baselines(recipe))
        problems.attempt(lambda: _check_teacher(recipe, context, dense, given, inputs.train))
        network = problems.attempt(lambda: skeleton(tuned, trust_remote_code=context.trust_remote_code))
        _read_calibration(recipe, context, tuned, inputs, problems)
        if network is not None:
            _check_compression(recipe, tuned, network, inputs, problems)
            _check_finetune(recipe, context, tuned, network, inputs.train, problems)
        tuned_on = inputs.train
        if recipe.finetune is None and _calibrates_on_task(recipe, inputs):
            read = partial(context.data(tuned).examples, recipe.data, "train", recipe.seed)
            tuned_on = problems.attempt(read) or []
        problems.extend(_leaks(recipe, context.data(tuned), tuned_on, inputs.selection, reported))
    return inputs


def _read_rows(recipe: Recipe, data: Data, inputs: Inputs, problems: Problems) -> dict[str, evaluate.Reading]:
    """Read the rows that are trained, selected and verified on; return those that are reported, by task."""
    tuned, seed = recipe.finetune, recipe.seed
    trainings = [config for config in (recipe.teacher and recipe.teacher.training, tuned) if config is not None]
    if trainings:
        inputs.train = problems.attempt(lambda: data.examples(recipe.data, "train", seed)) or []
        if any(config.evaluate_every is not None for config in trainings):
            inputs.validation = problems.attempt(lambda: data.examples(recipe.data, "validation", seed)) or []
    if tuned is not None and recipe.search.searches:
        inputs.selection = problems.attempt(lambda: data.tasks(recipe.data, "validation")) or []
    verifies = tuned is not None and recipe.merge is not None and recipe.verify is not None
    judged = recipe.evaluate is not None or verifies
    if judged and (test := problems.attempt(lambda: data.tasks(recipe.data, "test"))):
        # The checks of the model's behaviour use the first task's questions.
        inputs.task, inputs.test = test[0]
    reported: dict[str, evaluate.Reading] = {}
    if recipe.evaluate is not None:
        for name in problems.attempt(partial(evaluate.task_names, recipe.evaluate, recipe.data)) or []:
            if found := problems.attempt(partial(evaluate.read_rows, name, recipe.evaluate, recipe.data, data, seed)):
                reported[name] = found
    return reported


def _read_calibration(recipe: Recipe, context: Context, dense: Path, inputs: Inputs, problems: Problems) -> None:
    """Draw the calibration tokens of both compressing stages; None where a stage needs none."""
    pruning, grid = recipe.sparsify, recipe.quantize

    def draw(config: CalibrationConfig) -> torch.Tensor | None:
        return problems.attempt(lambda: context.calibration(dense, config, recipe.data))

    if pruning is not None and pruning.needs_text:
        inputs.tokens = draw(pruning.calibration)
    if grid is None or (grid.method == "rtn" and not recipe.joint):
        return
    if grid.calibration is None and inputs.tokens is not None:
        inputs.quantize_tokens = inputs.tokens
    elif grid.method != "rtn":
        inputs.quantize_tokens = draw(_quantize_calibration(recipe))


def _check_teacher(recipe: Recipe, context: Context, dense: Path, given: Path | None, train: list[Example]) -> None:
    """Refuse a teacher that is given and is no tuned form of the dense model, or a training that cannot be."""
    if recipe.teacher is None:
        return
    if given is not None:
        teacher.check(recipe.teacher, dense, given, recipe.model, trust_remote_code=recipe.trust_remote_code)
    elif (config := recipe.teacher.training) is not None:
        network = skeleton(dense, trust_remote_code=context.trust_remote_code)
        with Problems("teacher") as problems:
            _check_training(config, context, dense, network, train, problems)
            if stored(dense / MASK_FILE) is not None:
                problems.add(f"{dense} has a mask, and a dense LoRA would fill its zeros; give the dense model")


def _check_compression(
    recipe: Recipe, dense: Path, network: PreTrainedModel, inputs: Inputs, problems: Problems
) -> None:
    pruning, grid = recipe.sparsify, recipe.quantize

    def check_sparsify(config: SparsifyConfig) -> None:
        sparsify.check(config, network, find_targets(network, config.targets, config.ignore)[0], inputs.tokens)

    if pruning is not None:
        problems.attempt(partial(check_sparsify, pruning))
    if grid is not None:
        joint = pruning if recipe.joint else None
        targets = problems.attempt(lambda: find_targets(network, grid.targets, grid.ignore)[0])
        if targets is not None:
            problems.attempt(lambda: quantize.check(grid, dense, network, targets, inputs.quantize_tokens, joint))


def _check_finetune(
    recipe: Recipe, context: Context, dense: Path, network: PreTrainedModel, train: list[Example], problems: Problems
) -> None:
    config = recipe.finetune
    if config is None:
        return
    _check_training(config, context, dense, network, train, problems, quantised_first=recipe.quantize is not None)
    if recipe.quantize is not None and config.kind == "quantized":
        problems.attempt(lambda: _check_quantised_targets(recipe, network))


def _check_training(
    config: FinetuneConfig,
    context: Context,
    base: Path,
    network: PreTrainedModel,
    train: list[Example],
    problems: Problems,
    *,
    quantised_first: bool = False,
) -> None:
    problems.attempt(lambda: finetune.check(config, network))
    problems.attempt(lambda: finetune.check_precision(config, base, quantised_first=quantised_first))
    if train:
        pairs = [(e.prompt, e.answer) for e in train]
        problems.attempt(lambda: finetune.label(config, context.tokenizer(base), pairs, network.config))


def _check_quantised_targets(recipe: Recipe, network: PreTrainedModel) -> None:
    """Refuse quantisation-aware adapters on linears that the recipe leaves in floating point."""
    assert recipe.quantize is not None
    assert recipe.finetune is not None
    left = find_targets(network, recipe.quantize.targets, recipe.quantize.ignore)[1]
    for module in recipe.finetune.target_modules or ():  # left out: those that are quantised
        found = [name for name in left if name == module or name.endswith(f".{module}")]
        if found:
            raise InputError(
                f"finetune.target_modules has {module}, but quantize leaves {len(found)} such linears float "
                f"({found[0]}); quantise them too, or leave them out of target_modules"
            )


def _calibrates_on_task(recipe: Recipe, inputs: Inputs) -> bool:
    """Return whether calibration text was drawn from the training rows."""
    pruned = inputs.tokens is not None and recipe.sparsify is not None and recipe.sparsify.calibration.data == "task"
    return pruned or (inputs.quantize_tokens is not None and _quantize_calibration(recipe).data == "task")


def _quantize_calibration(recipe: Recipe) -> CalibrationConfig:
    own = None if recipe.quantize is None else recipe.quantize.calibration
    return own or (recipe.sparsify or SparsifyConfig()).calibration


def _leaks(
    recipe: Recipe,
    data: Data,
    train: Sequence[Example],
    selection: Sequence[tuple[Task, list[Example]]],
    reported: Mapping[str, evaluate.Reading],
) -> Iterator[str]:
    """Yield which reported questions a model would be tuned or calibrated or selected on.

    The loader keeps the splits of the recipe's own data apart; other tasks that are evaluated are compared here.
    """
    selected = [example for _, part in selection for example in part]
    if not train and not selected:
        return
    for name, (task, rows, _) in reported.items():
        # Punctuation counts if it does for either side.
        fold = task.fold_punctuation and data.folds_punctuation(recipe.data)
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
