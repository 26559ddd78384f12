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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqft.core.gptq import Quantized, gptq, round_to_nearest
from sqft.core.grid import stretches
from sqft.core.mask import finite, pack_mask
from sqft.digests import digest_text
from sqft.disk import check_space, read_json, write_json
from sqft.errors import InputError, NumericalError, Problems
from sqft.memory import release_memory
from sqft.model.calibrate import Block, check_tokens, overflow_remedy, visit_blocks
from sqft.model.expressible import inexpressible, layouts, left_float
from sqft.model.names import DiskNames
from sqft.model.prune import BlockPruner, make_pruner, mask_view, masked_of, packed_disk_masks
from sqft.model.targets import Target, coverage_of, find_targets, skeleton
from sqft.model.whole import check_whole
from sqft.recipe import CalibrationConfig
from sqft.stage import Stage
from sqft.storage.allocate import allocate, allocate_file
from sqft.storage.checkpoint import Checkpoint, copy_side_files
from sqft.storage.integers import quantization_config
from sqft.storage.masks import SPARSE_FROM, START_FILE, load_mask, write_masks
from sqft.storage.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sqft.artifact import Artifact, Draft
    from sqft.context import Context
    from sqft.recipe import QuantizeConfig, SparsifyConfig
    from sqft.storage.checkpoint import Layout

logger = logging.getLogger(__name__)


@dataclass
class _Quantizing:
    """The visitor's state: what to do with a block, and what was done so far."""

    config: QuantizeConfig
    scheme: Scheme
    source: Path
    targets: set[Target]
    pruner: BlockPruner | None
    pruned: set[Target]
    output: Checkpoint
    start: Checkpoint
    written: set[str] = field(default_factory=set)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0

    def __call__(self, block: Block) -> None:
        """Prune and quantise one block in memory, and write it."""
        disk_name = {parameter: name for name, parameter in block.names.parameter_of.items()}
        masks: dict[str, torch.Tensor] = {}
        pruned = [t for t in block.targets if t in self.pruned]
        if self.pruner is not None:
            masks = self.pruner(block, pruned, [t for t in pruned if self._in_one_loop(t)])
        for group in self._groups(block):
            release_memory()
            self._quantize(block, group, masks, disk_name)
        if self.pruner is not None:
            self.masked += sum(not bool(mask_view(t, masks).all()) for t in pruned)
            packed, shapes = packed_disk_masks(block, masks, pruned)
            self.masks |= packed
            self.shapes |= shapes
        # Linears that were pruned and stay float; all else is copied from the source.
        floats = {f"{t.module}.{t.parameter}" for t in block.targets if t in self.pruned and t not in self.targets}
        for name, tensor in block.names.to_disk(block.parameters() if floats else {}).items():
            if block.names.parameter_of[name] in floats:
                self._write(name, tensor.to(self.output.entries[name].dtype))

    def _store(self, name: str, quantized: Quantized) -> None:
        for suffix, tensor in self.scheme.encode(quantized.codes_OI, quantized.grid).items():
            self._write(f"{name.removesuffix('.weight')}.{suffix}", tensor)
        self.start.write(name, quantized.offset_OI)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self.output.write(name, tensor)
        self.written.add(name)

    def _groups(self, block: Block) -> list[list[Target]]:
        """Return the block's targets, those with the same input together: they have one hessian and one column loop."""
        groups: dict[tuple[int, bool], list[Target]] = {}
        for target in block.targets:
            if target in self.targets:
                shared = id(block.statistics[target]), self._in_one_loop(target)
                groups.setdefault(shared, []).append(target)
        return list(groups.values())

    def _in_one_loop(self, target: Target) -> bool:
        """Whether one loop over a target's columns both prunes and quantises it, from its unpruned weight."""
        return (
            self.pruner is not None
            and (self.pruner.in_loop or self.pruner.update)
            and self.config.method == "gptq"
            and target in self.pruned
            and target in self.targets
        )

    def _quantize(
        self, block: Block, group: list[Target], masks: dict[str, torch.Tensor], disk_name: dict[str, str]
    ) -> None:
        """Quantise linears that share an input and write them; the model in memory gets the dequantised weights."""
        views = [target.view(block.model) for target in group]
        mask_OI = torch.cat([self._mask(t, v, masks, disk_name) for t, v in zip(group, views, strict=True)])
        weight_OI, one_loop = torch.cat(views), self._in_one_loop(group[0])
        pattern = self.pruner.pattern if one_loop and self.pruner is not None and self.pruner.in_loop else None
        if not one_loop:
            weight_OI.mul_(mask_OI)
        names = ", ".join(target.name for target in group)
        hessian = block.statistics[group[0]].hessian_II
        options: dict[str, Any] = {
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "symmetric": self.config.symmetric,
            "dtype": self._scale_dtype(disk_name[f"{group[0].module}.weight"]),
            "least_zero": self.scheme.least_zero,
        }
        try:
            if self.config.method == "rtn":
                tall = round_to_nearest(weight_OI, **options)
            else:
                if hessian is None or block.statistics[group[0]].tokens == 0:
                    raise NumericalError("no calibration token reached it; use more or other calibration samples")
                options |= {"act_order": self.config.act_order, "damping": self.config.damping}
                tall = gptq(weight_OI, hessian, mask_OI, update=one_loop, pattern=pattern, **options)
        except NumericalError as error:
            raise NumericalError(f"{names}: {error} (quantize.calibration, quantize.damping)") from error
        lost = _relative_error(tall, weight_OI, hessian)
        rows = [view.shape[0] for view in views]
        kept_OI = mask_OI if tall.mask_OI is None else tall.mask_OI
        for target, view, part, kept in zip(group, views, tall.split(rows), kept_OI.split(rows), strict=True):
            if pattern is not None:
                mask_view(target, masks).copy_(kept)
            view.copy_(part.grid.dequantize(part.codes_OI, view.dtype))
            if not finite(view):
                raise NumericalError(
                    f"{target.name}: its quantised weights are NaN or Inf; {overflow_remedy(view.dtype)}"
                )
            self._store(disk_name[f"{target.module}.weight"], part)
            self.layers.append(
                {
                    "name": target.name,
                    "weights": view.numel(),
                    "sparsity": round(1 - int(kept.count_nonzero()) / kept.numel(), 6),
                    "relative_error": lost,
                }
            )

    def _scale_dtype(self, name: str) -> torch.dtype:
        return self.output.entries[f"{name.removesuffix('.weight')}.{self.scheme.suffixes[1]}"].dtype

    def _mask(
        self, target: Target, view: torch.Tensor, masks: dict[str, torch.Tensor], disk_name: dict[str, str]
    ) -> torch.Tensor:
        """Return what is not zero: not just pruned, not outside the model's stored mask, and not 0 anyway."""
        kept = view != 0
        name = disk_name[f"{target.module}.weight"]
        stored = load_mask(self.source, name)
        if stored is not None:
            kept &= stored
        if target in self.pruned:
            kept &= mask_view(target, masks)
        elif stored is not None:
            self.masks[name], self.shapes[name] = _packed(stored)
        elif int(kept.count_nonzero()) <= (1 - SPARSE_FROM) * kept.numel():
            self.masks[name], self.shapes[name] = _packed(kept)
        return kept


def _packed(mask: torch.Tensor) -> tuple[torch.Tensor, str]:
    return pack_mask(mask), ",".join(str(n) for n in mask.shape)


def _relative_error(tall: Quantized, weight_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float | None:
    """Return ‖(Ŵ − W) X‖² / ‖W X‖² on the calibration inputs, None without a hessian."""
    if hessian_II is None:
        return None
    lost, whole = 0.0, 0.0
    for rows in stretches(weight_OI):
        weight = weight_OI[rows].float()
        difference = tall.grid.rows(rows).dequantize(tall.codes_OI[rows]).sub_(weight)
        lost += float((difference @ hessian_II).mul_(difference).sum())
        whole += float((weight @ hessian_II).mul_(weight).sum())
    return round(lost / whole, 6) if whole > 0 else 0.0


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
    }
    inputs = {"model": model} | ({"mask": sparsify.mask} if sparsify is not None and sparsify.mask is not None else {})
    stage = Stage.of("quantize", out, settings, inputs, context.seed)

    def ready() -> _Ready:
        found = _open(config, sparsify, model, tokens, context)
        check_space(out, int(found.source.size_bytes * 1.1), "the quantised model")
        found.source.check_finite()
        return found

    def work(ready: _Ready, draft: Draft) -> dict[str, Any]:
        copy_side_files(model, draft.path)
        output = allocate(draft.path, ready.layout)
        allocate_file(draft.path / START_FILE, ready.start_layout)
        work = _Quantizing(
            config=config,
            scheme=scheme_of(config),
            source=model,
            targets=set(ready.targets),
            pruner=ready.pruner,
            pruned=set(ready.pruned),
            output=output,
            start=Checkpoint(draft.path, [str(START_FILE)]),
        )
        calibrated = config.calibration or (CalibrationConfig() if sparsify is None else sparsify.calibration)
        visit_blocks(
            model,
            list(dict.fromkeys([*ready.targets, *ready.pruned])),
            tokens,
            work,
            batch=calibrated.batch,
            hessian=config.method == "gptq" or (ready.pruner is not None and ready.pruner.needs_hessian),
            trust_remote_code=context.trust_remote_code,
        )
        _finish(work, ready.source, ready.network, draft.path)
        return _result(work, ready, sparsify, tokens)

    return stage.make(ready, work)


def _open(
    config: QuantizeConfig, sparsify: SparsifyConfig | None, model: Path, tokens: torch.Tensor | None, context: Context
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
    return _Ready(source, network, targets, skipped, pruned, pruner, layout, start_layout)


def _result(
    work: _Quantizing, ready: _Ready, sparsify: SparsifyConfig | None, tokens: torch.Tensor | None
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
    }


def _finish(work: _Quantizing, source: Checkpoint, network: Any, folder: Path) -> None:
    """Copy what quantising left as it was, and write the masks and what config.json says of the quantisation."""
    for name in source.entries:
        if name in work.output.entries and name not in work.written:
            work.output.write(name, source.read(name))
        mask = None if name in work.masks else load_mask(work.source, name)
        if mask is not None:
            work.masks[name], work.shapes[name] = _packed(mask)
    if work.masks:
        write_masks(folder, work.masks, work.shapes)
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
