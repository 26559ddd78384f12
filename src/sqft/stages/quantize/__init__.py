"""Quantize: a float model folder in, the same model on an integer grid out, its zeros kept; streamed block by block.

Optionally sparsifies in the same pass: a block is pruned and then quantised on the same calibration activations, and
later blocks see both. What is written:

- the model in compressed-tensors `pack-quantized` or GPTQ format; other tools open it;
- `sqft/mask.safetensors`, where the model is sparse: the mask that was given, chosen, or already stored with the model;
- `sqft/start.safetensors`: the weight just before rounding, as an int8 offset inside each code's bin.

Memory: a block and half as much for its masks, the hidden states of all sequences three times, 12 · I² bytes for the
widest hessian, and ten float32 copies of a stretch of rows (32 MiB each; `benchmarks/streaming.py --joint` measures
it). Every output file is laid out first and written in place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft import processes
from sqft.device import device_key
from sqft.digests import digest_text
from sqft.disk import check_space, read_json, write_json
from sqft.errors import InputError, Problems
from sqft.model.calibrate import check_tokens, visit_blocks
from sqft.model.expressible import inexpressible, layouts, left_float
from sqft.model.names import DiskNames
from sqft.model.prune import BlockPruner, make_pruner, masked_of
from sqft.model.targets import Target, coverage_of, find_targets, skeleton
from sqft.model.whole import check_whole
from sqft.recipe import CalibrationConfig
from sqft.stage import Stage
from sqft.stages.quantize.blocks import Quantizing
from sqft.storage.allocate import allocate, allocate_file
from sqft.storage.checkpoint import Checkpoint, copy_side_files
from sqft.storage.integers import quantization_config
from sqft.storage.masks import START_FILE, MaskFile, load_mask
from sqft.storage.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sqft.artifact import Artifact, Draft
    from sqft.context import Context
    from sqft.recipe import QuantizeConfig, SparsifyConfig
    from sqft.storage.checkpoint import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ready:
    """What was opened, laid out and checked before the work."""

    source: Checkpoint
    network: PreTrainedModel
    targets: list[Target]
    skipped: list[str]
    pruned: list[Target]
    pruner: BlockPruner | None
    layout: dict[str, Layout]
    start_layout: dict[str, Layout]


def run(
    config: QuantizeConfig,
    model: Path,
    tokens: torch.Tensor | None,
    out: Path,
    context: Context,
    *,
    sparsify: SparsifyConfig | None = None,
    calibration: dict[str, Any] | None = None,
) -> Artifact:
    """Quantise a model folder, and sparsify it in the same pass if `sparsify` is given.

    Args:
        config: the grid and the method.
        model: the float model's folder.
        tokens: calibration tokens, int64 [samples, length]; None where neither method needs any.
        out: the folder to make.
        context: its seed is recorded; nothing is drawn.
        sparsify: what to prune in the same pass; None keeps the model's own zeros.
        calibration: what the tokens were drawn from, recorded and part of the key.

    Raises:
        InputError: a model, targets or group size that cannot be quantised or stored; all at once, before any work.
        NumericalError: NaN or Inf in the weights or activations, or a hessian that is not positive definite; names the
            linear.
    """
    settings = {
        **config.model_dump(mode="json", exclude={"joint", "calibration"}),
        "sparsify": sparsify and sparsify.key,
        "calibrated_on": calibration,
        "calibration_digest": None if tokens is None else digest_text(str(tokens.tolist())),
        **device_key(context.device),
    }
    inputs = {"model": model} | ({"mask": sparsify.mask} if sparsify is not None and sparsify.mask is not None else {})
    stage = Stage.of("quantize", out, settings, inputs, context.seed)
    return stage.make(
        lambda: _open(config, sparsify, model, tokens, out, context),
        lambda ready, draft: _work(config, sparsify, model, tokens, context, ready, draft),
        shared=True,
    )


def _work(
    config: QuantizeConfig,
    sparsify: SparsifyConfig | None,
    model: Path,
    tokens: torch.Tensor | None,
    context: Context,
    ready: _Ready,
    draft: Draft,
) -> dict[str, Any]:
    """Quantise the model block by block, and return what the manifest says was done."""
    processes.once(lambda: _lay_out(model, ready, draft.path))
    work = Quantizing(
        config=config,
        scheme=scheme_of(config),
        source=model,
        targets=set(ready.targets),
        pruner=ready.pruner,
        pruned=set(ready.pruned),
        output=Checkpoint(draft.path),
        start=Checkpoint(draft.path, [str(START_FILE)]),
        masks=MaskFile(draft.path),
    )
    calibrated = config.calibration or (CalibrationConfig() if sparsify is None else sparsify.calibration)
    visit_blocks(
        model,
        list(dict.fromkeys([*ready.targets, *ready.pruned])),
        tokens,
        work,
        batch=calibrated.batch,
        hessian=config.method == "gptq" or (ready.pruner is not None and ready.pruner.needs_hessian),
        device=context.device,
        trust_remote_code=context.trust_remote_code,
    )
    if processes.first():
        _finish(work, ready.source, ready.network, draft.path)
    return _result(work, ready, sparsify, tokens)


def _open(
    config: QuantizeConfig,
    sparsify: SparsifyConfig | None,
    model: Path,
    tokens: torch.Tensor | None,
    out: Path,
    context: Context,
) -> _Ready:
    """Open the model and check what it must have."""
    if quantization_config(model) is not None:
        raise InputError(f"quantize: model {model} is quantised already; give the float model")
    source = Checkpoint(model)
    network = skeleton(model, trust_remote_code=context.trust_remote_code)
    check_whole(network, source)
    targets, skipped = find_targets(network, config.targets, config.ignore)
    pruned = [] if sparsify is None else find_targets(network, sparsify.targets, sparsify.ignore)[0]
    check(config, model, network, targets, tokens, sparsify)
    names = DiskNames(network, source)
    pruner = None if sparsify is None else make_pruner(sparsify, names, pruned)
    layout, start_layout = layouts(scheme_of(config), source, names, targets)
    check_space(out, int(source.size_bytes * 1.1), "the quantised model")
    source.check_finite()
    return _Ready(source, network, targets, skipped, pruned, pruner, layout, start_layout)


def _result(
    work: Quantizing, ready: _Ready, sparsify: SparsifyConfig | None, tokens: torch.Tensor | None
) -> dict[str, Any]:
    """Return what the manifest says was done."""
    weights = sum(layer["weights"] for layer in work.layers)
    zeros = sum(layer["weights"] * layer["sparsity"] for layer in work.layers)
    coverage = f"quantised {coverage_of(ready.network, ready.targets, ready.skipped, f' to {work.config.bits} bits')}"
    if sparsify is not None and sparsify.mask is not None:
        coverage += masked_of(work.masked, ready.pruned)
    logger.info("%s, %.1f %% of their weights zero", coverage, 100 * zeros / weights)
    return {
        "coverage": coverage,
        "sparsity": round(zeros / weights, 6),
        "calibration_tokens": 0 if tokens is None else int(tokens.numel()),
        "weights_bytes": work.output.size_bytes,
        "layers": work.layers,
        **processes.record(),
    }


def _lay_out(model: Path, ready: _Ready, folder: Path) -> None:
    """Make the files that are written block by block, and copy what lies beside the weights."""
    copy_side_files(model, folder)
    allocate(folder, ready.layout)
    allocate_file(folder / START_FILE, ready.start_layout)


def _finish(work: Quantizing, source: Checkpoint, network: Any, folder: Path) -> None:
    """Copy what quantising left as it was, and write the masks and what config.json says of the quantisation."""
    for name in source.entries:
        if name in work.output.entries and name not in work.written:
            work.output.write(name, source.read(name))
        mask = None if name in work.masks else load_mask(work.source, name)
        if mask is not None:
            work.masks.write(name, mask)
    work.masks.finish()
    config = read_json(folder / "config.json")
    config["quantization_config"] = work.scheme.to_config(left_float(network, list(work.targets)))
    write_json(folder / "config.json", config)


def scheme_of(config: QuantizeConfig) -> Scheme:
    """Return the form in which a recipe wants the weights."""
    return Scheme(config.format, config.bits, config.group_size, config.symmetric)


def check(
    config: QuantizeConfig,
    folder: Path,
    network: Any,
    targets: list[Target],
    tokens: torch.Tensor | None,
    sparsify: SparsifyConfig | None = None,
) -> None:
    """Refuse, all at once, what would only show in the middle of the work."""
    if quantization_config(folder) is not None:
        raise InputError(f"quantize: model {folder} is quantised already; give the float model")
    with Problems("quantize") as problems:
        for problem in inexpressible(scheme_of(config), folder, network, targets):
            problems.add(problem)
        if config.method == "gptq" and tokens is None:
            problems.add("method gptq needs calibration tokens; use rtn without them")
        if sparsify is not None and sparsify.needs_text and tokens is None:
            wants = "update" if sparsify.update else f"method {sparsify.method}"
            problems.add(f"sparsify.{wants} needs calibration tokens")
        if tokens is not None:
            check_tokens(tokens, network, problems)
