"""Verbs that make a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.context import Context
from sqft.errors import InputError
from sqft.recipe import CalibrationConfig, FinetuneConfig, MergeConfig, QuantizeConfig, SearchConfig, SparsifyConfig
from sqft.stages import extract as _extract
from sqft.stages import finetune as _finetune
from sqft.stages import merge as _merge
from sqft.stages import quantize as _quantize
from sqft.stages import report as _report
from sqft.stages import sparsify as _sparsify
from sqft.stages.finetune.taught import check_given
from sqft.verbs.arguments import Source, as_data, as_path, calibrate, parse, refuse_trained_on
from sqft.verbs.places import fix_date, shared_model_folder

if TYPE_CHECKING:
    from sqft.artifact import Artifact
    from sqft.data.tasks import Example, Task
    from sqft.device import DeviceName


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    data: Source | None = None,
    seed: int = 0,
    model_revision: str | None = None,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Artifact:
    """Set the least important weights of a model to zero.

    Args:
        model: Hub id, folder, or .gguf file.
        out: the folder to make.
        data: whose training rows are the calibration text; None for methods that need none, or with
            `calibration={"data": FILE}`.
        seed: of everything drawn.
        model_revision: branch, tag or commit of a Hub model.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.SparsifyConfig`.

    Returns:
        The folder with its manifest.

    Raises:
        InputError: an unknown setting, or a model or data that cannot be used; before any work.
        NumericalError: NaN or Inf in the weights or activations.
    """
    config, out = parse(SparsifyConfig, settings, "sparsify"), as_path(out)
    context = Context(seed, trust_remote_code, device)
    folder = shared_model_folder(model, out.parent, model_revision)
    text = config.calibration if config.needs_text else None
    tokens, drawn = calibrate(context, folder, text, data, out)
    return _sparsify.run(config, folder, tokens, out, context, calibration=drawn)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    data: Source | None = None,
    sparsity: float | None = None,
    pruner: str = "wanda",
    update: bool | None = None,
    seed: int = 0,
    model_revision: str | None = None,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Artifact:
    """Round a model's weights to an integer grid, keeping its zeros.

    Args:
        model: Hub id, folder, or .gguf file: the float model, sparse or not.
        out: the folder to make.
        data: as of :func:`sparsify`.
        sparsity: also prune this fraction of each row, in the same pass.
        pruner: how `sparsity` chooses weights.
        update: whether the weights that `sparsity` keeps make up for those it prunes; None is as the pruner does.
        seed: of everything drawn.
        model_revision: branch, tag or commit of a Hub model.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.QuantizeConfig`.

    Returns:
        The folder with its manifest.

    Raises:
        InputError: an unknown setting, or a model or data that cannot be used; before any work.
        NumericalError: NaN or Inf in the weights or activations, or a hessian that is not positive definite.
    """
    config, out = parse(QuantizeConfig, settings, "quantize"), as_path(out)
    context = Context(seed, trust_remote_code, device)
    folder = shared_model_folder(model, out.parent, model_revision)
    calibration = config.calibration or CalibrationConfig()
    pruning = None
    if update is not None and sparsity is None:
        raise InputError("quantize: update makes up for what sparsity prunes; give a sparsity, or leave update out")
    if sparsity is not None:
        wanted = {"sparsity": sparsity, "method": pruner, "update": update, "calibration": calibration}
        pruning = parse(SparsifyConfig, wanted, "quantize")
    needed = config.method == "gptq" or (pruning is not None and pruning.needs_text)
    tokens, drawn = calibrate(context, folder, calibration if needed else None, data, out)
    return _quantize.run(config, folder, tokens, out, context, sparsify=pruning, calibration=drawn)


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    data: Source,
    teacher: str | Path | None = None,
    seed: int = 0,
    model_revision: str | None = None,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Artifact:
    """Train elastic, masked adapters on a frozen model.

    Args:
        model: Hub id or folder.
        out: the folder to make.
        data: what to train on.
        teacher: the uncompressed model, tuned or not, that `distill={"hidden": 1}` learns from: Hub id or folder.
        seed: of everything drawn.
        model_revision: branch, tag or commit of a Hub model.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.FinetuneConfig`.

    Returns:
        The super-adapter's folder with its manifest.

    Raises:
        InputError: an unknown setting, targets that match nothing, examples that do not fit, or `distill` and
            `teacher` without each other.
        NumericalError: the training diverged.
    """
    config, out = parse(FinetuneConfig, settings, "finetune"), as_path(out)
    check_given(config, teacher)
    taught_by = None if teacher is None else shared_model_folder(teacher, out.parent)
    context = Context(seed, trust_remote_code, device)
    folder = shared_model_folder(model, out.parent, model_revision)
    source = fix_date(as_data(data), context.tokenizer(folder), out)
    read = context.data(folder)
    train = [(e.prompt, e.answer) for e in read.examples(source, "train", seed)]
    validation = []
    if config.evaluate_every is not None:
        validation = [(e.prompt, e.answer) for e in read.examples(source, "validation", seed)]
    drawn = {"data": source.model_dump(mode="json")}
    return _finetune.run(config, folder, train, validation, out, context, data=drawn, teacher=taught_by)


def extract(
    adapter: str | Path, out: str | Path, *, strategy: str = "heuristic", ranks_file: str | Path | None = None
) -> Artifact:
    """Take a sub-adapter of given ranks out of a super-adapter; :func:`search` looks for the best.

    Args:
        adapter: the super-adapter's folder.
        out: the folder to make.
        strategy: heuristic (the median rank of each group), maximal, minimal, or file.
        ranks_file: of strategy file, a JSON object {group: rank}.

    Returns:
        The sub-adapter's folder with its manifest.

    Raises:
        InputError: the adapter or the file of ranks cannot be used, or the strategy is a search.
    """
    values = {"strategy": strategy} | ({} if ranks_file is None else {"ranks_file": str(ranks_file)})
    config = parse(SearchConfig, values, "extract")
    if config.searches:
        raise InputError(f"extract: strategy {strategy} evaluates configurations; use search")
    return _extract.run(config, as_path(adapter), as_path(out), Context())


def search(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    data: Source | None = None,
    strategy: str = "hill_climbing",
    seed: int = 0,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Artifact:
    """Find the best sub-adapter of a super-adapter on validation rows.

    Args:
        adapter: the super-adapter's folder.
        out: the folder to make; processes that are given the same one share the work.
        base: the base model's folder.
        data: whose validation rows judge.
        strategy: hill_climbing, nsga2 or random.
        seed: of what is sampled.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.SearchConfig`.

    Returns:
        The sub-adapter's folder with its manifest.

    Raises:
        InputError: an unknown setting, an adapter or data that cannot be used, or rows that the adapter was trained on.
    """
    config = parse(SearchConfig, {**settings, "strategy": strategy}, "search")
    context, adapter, base = Context(seed, trust_remote_code, device), as_path(adapter), as_path(base)
    rows: Sequence[tuple[Task, Sequence[Example]]] = ()
    if config.searches and data is not None:
        rows = context.data(base).tasks(as_data(data), "validation")
        refuse_trained_on(adapter, rows, context, base)
    return _extract.run(config, adapter, as_path(out), context, base=base, rows=rows)


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Artifact:
    """Merge an adapter into its base.

    Args:
        model: the base model's folder.
        adapter: the adapter's folder.
        out: the folder to make: a standard model folder.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.MergeConfig`.

    Returns:
        The merged model's folder with its manifest.

    Raises:
        InputError: an unknown setting, an adapter of another base, or one that would lose zeros or precision.
    """
    config = parse(MergeConfig, settings, "merge")
    merged = _merge.run(config, as_path(model), as_path(adapter), as_path(out), Context(0, trust_remote_code, device))
    _report.write_card(merged)
    return merged
