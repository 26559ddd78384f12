"""Sparsify: a model folder in, the same model with zeros and their masks out, streamed block by block.

The output is a copy of the input whose pruned tensors are overwritten in place, so names, sharding and dtypes are the
original's. `sqft/mask.safetensors` holds one packed mask per pruned tensor, under its on-disk name, packed along the
tensor's last dimension as stored, with the unpacked shape in the metadata.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft import processes
from sqft.device import device_key
from sqft.digests import digest_text
from sqft.disk import check_space
from sqft.errors import InputError, Problems
from sqft.model.calibrate import Block, check_tokens, visit_blocks
from sqft.model.names import DiskNames
from sqft.model.prune import BlockPruner, disk_masks, make_pruner, mask_view, masked_of
from sqft.model.targets import Target, coverage_of, find_targets, skeleton
from sqft.model.whole import check_whole
from sqft.recipe import SparsifyConfig, parse_pattern
from sqft.stage import Stage
from sqft.storage.checkpoint import Checkpoint, copy_model
from sqft.storage.integers import quantization_config
from sqft.storage.masks import MaskFile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sqft.artifact import Artifact, Draft
    from sqft.context import Context

logger = logging.getLogger(__name__)


@dataclass
class _Pruning:
    """The visitor's state: what to do with a block, and what was done so far."""

    prune: BlockPruner
    output: Checkpoint
    masks: MaskFile
    layers: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0

    def __call__(self, block: Block) -> None:
        """Prune one block in memory and on disk."""
        masks = self.prune(block, block.targets)
        for target in block.targets:
            mask_OI = mask_view(target, masks)
            kept = int(mask_OI.count_nonzero())
            self.masked += kept < mask_OI.numel()
            self.layers.append(
                {"name": target.name, "weights": mask_OI.numel(), "sparsity": round(1 - kept / mask_OI.numel(), 6)}
            )
        touched = {f"{t.module}.{t.parameter}" for t in block.targets}
        for name, tensor in block.names.to_disk(block.parameters()).items():
            if block.names.parameter_of[name] in touched:
                self.output.write(name, tensor.to(self.output.entries[name].dtype))
        for name, mask in disk_masks(block, masks, block.targets):
            self.masks.write(name, mask)


@dataclass(frozen=True)
class _Ready:
    """What was opened and checked before the work."""

    source: Checkpoint
    network: PreTrainedModel
    targets: list[Target]
    skipped: list[str]
    pruner: BlockPruner


def run(
    config: SparsifyConfig,
    model: Path,
    tokens: torch.Tensor | None,
    out: Path,
    context: Context,
    *,
    calibration: dict[str, Any] | None = None,
) -> Artifact:
    """Sparsify a model folder.

    Args:
        config: what to prune and how much.
        model: the model folder.
        tokens: calibration tokens, int64 [samples, length]; None for methods and masks that need none.
        out: the folder to make.
        context: its seed is recorded; the pruning itself draws nothing.
        calibration: what the tokens were drawn from, recorded and part of the key.

    Raises:
        InputError: bad targets, pattern, mask or model, before any pruning; or an expert no token reached.
        NumericalError: NaN or Inf in the weights or activations; names the linear or the block.
    """
    settings = {
        **config.key,
        "calibrated_on": calibration,
        "calibration_digest": None if tokens is None else digest_text(str(tokens.tolist())),
        **device_key(context.device),
    }
    inputs = {"model": model} | ({} if config.mask is None else {"mask": config.mask})
    stage = Stage.of("sparsify", out, settings, inputs, context.seed)
    return stage.make(
        lambda: _open(config, model, tokens, out, context),
        lambda ready, draft: _work(config, model, tokens, context, ready, draft),
        shared=True,
    )


def _open(config: SparsifyConfig, model: Path, tokens: torch.Tensor | None, out: Path, context: Context) -> _Ready:
    """Open the model and check what it must have."""
    if quantization_config(model) is not None:
        raise InputError(f"model {model}: is quantised; sparsify the float model, then quantise it")
    source = Checkpoint(model)
    network = skeleton(model, trust_remote_code=context.trust_remote_code)
    check_whole(network, source)
    targets, skipped = find_targets(network, config.targets, config.ignore)
    pruner = make_pruner(config, DiskNames(network, source), targets)
    check(config, network, targets, tokens)
    check_space(out, int(source.size_bytes * 1.1), "the sparse model")
    source.check_finite()
    return _Ready(source, network, targets, skipped, pruner)


def _work(
    config: SparsifyConfig, model: Path, tokens: torch.Tensor | None, context: Context, ready: _Ready, draft: Draft
) -> dict[str, Any]:
    """Prune the model block by block, and return what the manifest says was done."""
    processes.once(lambda: copy_model(model, draft.path))
    pruning = _Pruning(ready.pruner, Checkpoint(draft.path), MaskFile(draft.path))
    visit_blocks(
        model,
        ready.targets,
        tokens,
        pruning,
        batch=config.calibration.batch,
        hessian=ready.pruner.needs_hessian,
        device=context.device,
        trust_remote_code=context.trust_remote_code,
    )
    if processes.first():
        pruning.masks.finish()
    return _result(config, ready, pruning, tokens)


def _result(config: SparsifyConfig, ready: _Ready, pruning: _Pruning, tokens: torch.Tensor | None) -> dict[str, Any]:
    """Return what the manifest says was done."""
    weights = sum(layer["weights"] for layer in pruning.layers)
    zeros = sum(layer["weights"] * layer["sparsity"] for layer in pruning.layers)
    coverage = f"sparsified {coverage_of(ready.network, ready.targets, ready.skipped)}"
    if config.mask is not None:
        coverage += masked_of(pruning.masked, ready.targets)
    logger.info("%s to %.1f %%", coverage, 100 * zeros / weights)
    return {
        "coverage": coverage,
        "sparsity": round(zeros / weights, 6),
        "calibration_tokens": 0 if tokens is None else int(tokens.numel()),
        "layers": pruning.layers,
        **processes.record(),
    }


def check(config: SparsifyConfig, network: Any, targets: list[Target], tokens: torch.Tensor | None) -> None:
    """Refuse, all at once, what would only show in the middle of the work."""
    structure = parse_pattern(config.pattern)
    with Problems("sparsify") as problems:
        if structure is not None:
            wrong = [t for t in targets if t.view(network).shape[1] % structure[1]]
            for target in wrong[:5]:
                width = target.view(network).shape[1]
                problems.add(f"pattern {config.pattern} does not divide {target.name}, whose rows have {width} weights")
            if len(wrong) > 5:
                problems.add(
                    f"and {len(wrong) - 5} more linears; add them to sparsify.ignore or choose another pattern"
                )
        if tokens is None:
            if config.needs_text:
                problems.add(f"{'update' if config.update else f'method {config.method}'} needs calibration tokens")
        else:
            check_tokens(tokens, network, problems)
