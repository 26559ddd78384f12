"""Sparsify: a model folder in, the same model with zeros and their masks out, streamed block by block.

The output is a copy of the input whose pruned tensors are overwritten in place, so names, sharding and dtypes are the
original's. `sqft/mask.safetensors` holds one packed mask per pruned tensor, under its on-disk name, packed along the
tensor's last dimension as stored, with the unpacked shape in the metadata.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sqft.artifact import Artifact, check_space, describe, finished, writing
from sqft.core.mask import mask_from_score, pack_mask, unpack_mask
from sqft.core.pruners import Method, Pattern, Statistics, magnitude, resolve_method
from sqft.errors import InputError, Problems
from sqft.model.calibrate import Block, visit_blocks
from sqft.model.checkpoint import Checkpoint, copy_model
from sqft.model.layers import MASK_FILE
from sqft.model.targets import Target, find_targets, skeleton
from sqft.recipe import SparsifyConfig, parse_pattern

logger = logging.getLogger(__name__)


@dataclass
class _Pruning:
    """The visitor's state: what to do with a block, and what was done so far."""

    config: SparsifyConfig
    method: Method
    output: Checkpoint
    given: dict[str, torch.Tensor] | None
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, block: Block) -> None:
        """Prune one block in memory and on disk."""
        parameters = block.parameters()
        masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in parameters.items()}
        if self.given is not None:
            self._spread_given(block, masks)
        for target in block.targets:
            weight_OI = target.view(block.model)
            mask_OI = _mask_view(target, masks)
            if self.given is None:
                pruned, mask = self._prune(target, weight_OI, block.statistics[target])
                mask_OI.copy_(mask)
                weight_OI.copy_(pruned)
            else:
                weight_OI.masked_fill_(~mask_OI, 0)
            kept = int(mask_OI.count_nonzero())
            self.layers.append(
                {"name": target.name, "weights": mask_OI.numel(), "sparsity": round(1 - kept / mask_OI.numel(), 6)}
            )
        touched = {f"{t.module}.{t.parameter}" for t in block.targets}
        for name, tensor in block.names.to_disk(parameters).items():
            if block.names.parameter_of[name] in touched:
                self.output.write(name, tensor.to(self.output.entries[name].dtype))
        for name, mask in block.names.to_disk(_bytes(masks)).items():
            if block.names.parameter_of[name] in touched:
                self.masks[name] = pack_mask(mask.view(torch.bool))
                self.shapes[name] = ",".join(str(n) for n in mask.shape)

    def _prune(
        self, target: Target, weight_OI: torch.Tensor, statistics: Statistics
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pattern = Pattern(self.config.sparsity, parse_pattern(self.config.pattern))
        if statistics.tokens:
            return self.method.prune(weight_OI, statistics, pattern)
        if self.config.unreached_experts == "magnitude":
            logger.warning("%s: no calibration token reached it; pruned by magnitude", target.name)
            mask = mask_from_score(magnitude(weight_OI, statistics), pattern.sparsity, pattern.structure)
            return torch.where(mask, weight_OI, 0.0), mask
        raise InputError(
            f"{target.name}: no calibration token reached it, so its inputs are unknown; use more or other calibration "
            "samples (sparsify.calibration), or allow sparsify.unreached_experts: magnitude"
        )

    def _spread_given(self, block: Block, masks: dict[str, torch.Tensor]) -> None:
        """Fill the in-memory masks of a block from a file of on-disk masks, one disk tensor at a time."""
        assert self.given is not None
        disk = block.names.to_disk(_bytes(masks))
        for name in disk:
            if name in self.given:
                masks[block.names.parameter_of[name]].copy_(self.given[name])


def _bytes(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return bool masks as uint8, which transformers' conversions take, over the same memory."""
    return {name: mask.view(torch.uint8) for name, mask in masks.items()}


def _mask_view(target: Target, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = masks[f"{target.module}.{target.parameter}"]
    if target.index is not None:
        mask = mask[target.index]
    return mask.T if target.transposed else mask


def run(
    config: SparsifyConfig,
    model: Path,
    tokens: torch.Tensor | None,
    out: Path,
    *,
    seed: int,
    calibration: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Sparsify a model folder.

    Args:
        config: what to prune and how much.
        model: the model folder.
        tokens: calibration tokens, int64 [samples, length]; None for methods and masks that need none.
        out: the folder to make.
        seed: recorded; the pruning itself draws nothing.
        calibration: what the tokens were drawn from, recorded and part of the key.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: bad targets, pattern, mask or model, before any pruning; or an expert no token reached.
        NumericalError: NaN or Inf in the weights.
    """
    settings = {**config.model_dump(mode="json"), "calibrated_on": calibration}
    description = describe("sparsify", settings, {"model": model}, seed)
    if done := finished(out, description):
        return done
    source = Checkpoint(model)
    network = skeleton(model, trust_remote_code=trust_remote_code)
    targets, skipped = find_targets(network, config.targets, config.ignore)
    method = resolve_method(config.method)
    given = _read_masks(Path(config.mask), source) if config.mask else None
    check(config, network, targets, tokens)
    check_space(out, int(source.size_bytes * 1.1), "the sparse model")
    source.check_finite()
    with writing(out, description) as draft:
        pruning = _Pruning(config, method, copy_model(model, draft.path), given)
        if tokens is None:
            tokens = torch.zeros(1, 1, dtype=torch.long)
        visit_blocks(
            model,
            targets,
            tokens,
            pruning,
            batch=config.calibration.batch,
            hessian=method.needs_hessian and given is None,
            trust_remote_code=trust_remote_code,
        )
        save_file(pruning.masks, draft.path / MASK_FILE, metadata=pruning.shapes)
        weights = sum(layer["weights"] for layer in pruning.layers)
        zeros = sum(layer["weights"] * layer["sparsity"] for layer in pruning.layers)
        coverage = f"sparsified {len(targets)}/{len(targets) + len(skipped)} linears"
        if skipped:
            coverage += f"; skipped {', '.join(skipped[:4])}{', ...' if len(skipped) > 4 else ''} (ignored)"
        draft.result = {
            "coverage": coverage,
            "sparsity": round(zeros / weights, 6),
            "calibration_tokens": int(tokens.numel()),
            "layers": pruning.layers,
        }
        logger.info("%s to %.1f %%", coverage, 100 * zeros / weights)
    return Artifact.open(out)


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
            if config.mask is None and config.method != "magnitude":
                problems.add(f"method {config.method} needs calibration tokens")
        else:
            if tokens.numel() == 0:
                problems.add("there are no calibration tokens; give data with text in it")
            limit = getattr(network.config, "max_position_embeddings", None)
            if limit is not None and tokens.ndim == 2 and tokens.shape[1] > limit:
                problems.add(
                    f"calibration.length is {tokens.shape[1]} tokens, more than the {limit} that the model allows"
                )


def _read_masks(file: Path, source: Checkpoint) -> dict[str, torch.Tensor]:
    """Read masks made elsewhere: packed ones of ours, or plain bool or 0/1 tensors; keys are on-disk weight names."""
    from safetensors import safe_open

    try:
        tensors = load_file(file)
        with safe_open(str(file), framework="pt") as stream:
            metadata = stream.metadata() or {}
    except (OSError, ValueError) as error:
        raise InputError(f"sparsify.mask {file}: cannot be read as safetensors ({error})") from error
    masks = {}
    with Problems(f"sparsify.mask {file}") as problems:
        for key, tensor in tensors.items():
            name = key if key in source.entries else f"{key}.weight"
            if name not in source.entries:
                problems.add(f"{key} is no weight of the model")
                continue
            shape = source.entries[name].shape
            mask = unpack_mask(tensor, shape[-1]) if key in metadata else tensor
            if tuple(mask.shape) != shape:
                problems.add(f"{key} has shape {list(mask.shape)}, the weight {list(shape)}")
            elif not bool(((mask == 0) | (mask == 1)).all()):
                problems.add(f"{key} has values other than 0 and 1")
            else:
                masks[name] = mask.bool()
    return masks
