"""Verbs that judge a model and write a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.context import Context
from sqft.device import device_key, resolve
from sqft.disk import local_path
from sqft.recipe import EvaluateConfig, VerifyConfig
from sqft.stages import evaluate as _evaluate
from sqft.stages import verify as _verify
from sqft.verbs.arguments import Result, Source, as_data, as_flags, as_path, parse
from sqft.verbs.places import fix_date, model_folder, result_file

if TYPE_CHECKING:
    from sqft.device import DeviceName


def verify(
    merged: str | Path,
    *,
    base: str | Path,
    adapter: str | Path,
    data: Source | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Result:
    """Prove that a merged model is its base with its adapter.

    Args:
        merged: the merged model's folder.
        base: the base model's folder.
        adapter: the adapter's folder.
        data: whose test rows are answered; None compares logits on random tokens alone.
        out: JSON file to write; None is one under runs/verify for these very arguments.
        seed: of the random tokens.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.VerifyConfig`.

    Returns:
        {passed, checks: [{name, passed, value, bound, detail}], ...}; a check that failed is no exception.

    Raises:
        InputError: an unknown setting, a folder that cannot be read, or an adapter of another base.
    """
    config = parse(VerifyConfig, settings, "verify")
    merged, base, adapter = as_path(merged), as_path(base), as_path(adapter)
    named: dict[str, Any] = {"merged": merged, "base": base, "adapter": adapter, "seed": seed}
    named |= {"trust_remote_code": trust_remote_code, **device_key(resolve(device))}
    file = result_file(as_path(out), "verify", {**named, **as_flags(data, settings)}, merged, base, adapter)
    context = Context(seed, trust_remote_code, device)
    task, examples = None, []
    if data is not None:
        source, read = as_data(data), context.data(base)
        task, examples = read.task(source), read.examples(source, "test", seed)
    return Result(_verify.run(config, merged, base, adapter, file, context, task=task, examples=examples), file)


def evaluate(
    model: str | Path,
    *,
    data: Source,
    adapter: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    model_revision: str | None = None,
    trust_remote_code: bool = False,
    device: DeviceName = "auto",
    **settings: Any,
) -> Result:
    """Measure a model on tasks through lm-eval.

    Args:
        model: Hub id, folder, or .gguf file.
        data: its test rows are reported, unless `tasks` names others.
        adapter: an adapter to attach, unmerged.
        out: JSON file to write; None is one under runs/evaluate for these very arguments.
        seed: of the worked examples.
        model_revision: branch, tag or commit of a Hub model.
        trust_remote_code: run code that the model's repository brings.
        device: auto, cpu or cuda: a CUDA card where there is one, or this one.
        **settings: those of :class:`sqft.recipe.EvaluateConfig`.

    Returns:
        {tasks: {name: {metric, value, stderr, n, ...}}, seed, versions, ...}.

    Raises:
        InputError: an unknown setting, or a model or data that cannot be used.
    """
    config = parse(EvaluateConfig, settings, "evaluate")
    adapter = as_path(adapter)
    named = {"model": model, "adapter": adapter, "seed": seed, "model_revision": model_revision}
    named |= {"trust_remote_code": trust_remote_code, **device_key(resolve(device)), **as_flags(data, settings)}
    inputs = [local_path(model)] + ([] if adapter is None else [adapter])
    file = result_file(as_path(out), "evaluate", named, *inputs)
    folder = model_folder(model, file.parent, model_revision)
    context = Context(seed, trust_remote_code, device)
    source = fix_date(as_data(data), context.tokenizer(folder), file)
    return Result(_evaluate.run(config, source, folder, adapter, file, context), file)
