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
from torch import nn

from sqft.artifact import Artifact, describe, finished, writing
from sqft.core.gptq import Quantized, gptq, round_to_nearest
from sqft.core.grid import stretches
from sqft.core.mask import pack_mask
from sqft.digests import digest_text
from sqft.disk import check_space, write_json
from sqft.errors import NumericalError, Problems
from sqft.memory import release_memory
from sqft.model.calibrate import Block, check_tokens, visit_blocks
from sqft.model.checkpoint import Checkpoint, Layout, allocate, allocate_file, copy_side_files
from sqft.model.formats import Scheme, quantization_config
from sqft.model.load import read_json
from sqft.model.prune import BlockPruner, make_pruner, mask_view, packed_disk_masks
from sqft.model.stored import SPARSE_FROM, START_FILE, load_mask, write_masks
from sqft.model.targets import DiskNames, Target, coverage_of, find_targets, skeleton
from sqft.recipe import CalibrationConfig

if TYPE_CHECKING:
    from sqft.recipe import QuantizeConfig, SparsifyConfig

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

    def __call__(self, block: Block) -> None:
        """Prune and quantise one block in memory, and write it."""
        disk_name = {parameter: name for name, parameter in block.names.parameter_of.items()}
        masks: dict[str, torch.Tensor] = {}
        if self.pruner is not None:
            pruned = [t for t in block.targets if t in self.pruned]
            masks = self.pruner(block, pruned)
            packed, shapes = packed_disk_masks(block, masks, pruned)
            self.masks |= packed
            self.shapes |= shapes
        for group in self._groups(block):
            release_memory()
            self._quantize(block, group, masks, disk_name)
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
        groups: dict[int, list[Target]] = {}
        for target in block.targets:
            if target in self.targets:
                groups.setdefault(id(block.statistics[target]), []).append(target)
        return list(groups.values())

    def _quantize(
        self, block: Block, group: list[Target], masks: dict[str, torch.Tensor], disk_name: dict[str, str]
    ) -> None:
        """Quantise linears that share an input and write them; the model in memory gets the dequantised weights."""
        views = [target.view(block.model) for target in group]
        mask_OI = torch.cat([self._mask(t, v, masks, disk_name) for t, v in zip(group, views, strict=True)])
        weight_OI = torch.cat(views).mul_(mask_OI)
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
                tall = gptq(
                    weight_OI, hessian, mask_OI, act_order=self.config.act_order, damping=self.config.damping, **options
                )
        except NumericalError as error:
            raise NumericalError(f"{names}: {error} (quantize.calibration, quantize.damping)") from error
        lost = _relative_error(tall, weight_OI, hessian)
        parts = tall.split([view.shape[0] for view in views])
        for target, view, part, kept in zip(
            group, views, parts, mask_OI.split([v.shape[0] for v in views]), strict=True
        ):
            view.copy_(part.grid.dequantize(part.codes_OI, view.dtype))
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


def run(
    config: QuantizeConfig,
    model: Path,
    tokens: torch.Tensor | None,
    out: Path,
    *,
    seed: int,
    sparsify: SparsifyConfig | None = None,
    calibration: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Quantise a model folder, and sparsify it in the same pass if asked to.

    Args:
        config: the grid and the method.
        model: the float model's folder.
        tokens: calibration tokens, int64 [samples, length]; None where neither method needs any.
        out: the folder to make.
        seed: recorded; nothing is drawn.
        sparsify: what to prune in the same pass; None keeps the model's own zeros.
        calibration: what the tokens were drawn from, recorded and part of the key.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: a model, targets or group size that cannot be quantised or stored; all at once, before any work.
        NumericalError: NaN or Inf in the weights or activations, or a hessian that is not positive definite; names the
            linear.
    """
    settings = {
        **config.model_dump(mode="json", exclude={"joint", "calibration"}),
        "sparsify": sparsify and sparsify.model_dump(mode="json"),
        "calibrated_on": calibration,
        "calibration_digest": None if tokens is None else digest_text(str(tokens.tolist())),
    }
    inputs: dict[str, str | Path] = {"model": model}
    if sparsify is not None and sparsify.mask is not None:
        inputs["mask"] = sparsify.mask
    description = describe("quantize", settings, inputs, seed)
    if done := finished(out, description):
        return done
    source = Checkpoint(model)
    network = skeleton(model, trust_remote_code=trust_remote_code)
    targets, skipped = find_targets(network, config.targets, config.ignore)
    pruned = [] if sparsify is None else find_targets(network, sparsify.targets, sparsify.ignore)[0]
    check(config, model, network, targets, tokens, sparsify)
    scheme = Scheme(config.format, config.bits, config.group_size, config.symmetric)
    pruner = None if sparsify is None else make_pruner(sparsify, source)
    calibrated = config.calibration or (CalibrationConfig() if sparsify is None else sparsify.calibration)
    names = DiskNames(network, source)
    layout, start_layout = _layouts(scheme, source, names, targets)
    check_space(out, int(source.size_bytes * 1.1), "the quantised model")
    source.check_finite()
    with writing(out, description) as draft:
        copy_side_files(model, draft.path, index=False)
        output = allocate(draft.path, layout)
        allocate_file(draft.path / START_FILE, start_layout)
        work = _Quantizing(
            config=config,
            scheme=scheme,
            source=model,
            targets=set(targets),
            pruner=pruner,
            pruned=set(pruned),
            output=output,
            start=Checkpoint(draft.path, [str(START_FILE)]),
        )
        visit_blocks(
            model,
            list(dict.fromkeys([*targets, *pruned])),
            torch.zeros(1, 1, dtype=torch.long) if tokens is None else tokens,
            work,
            batch=calibrated.batch,
            hessian=config.method == "gptq" or (pruner is not None and pruner.needs_hessian),
            trust_remote_code=trust_remote_code,
        )
        _finish(work, source, network, draft.path)
        weights = sum(layer["weights"] for layer in work.layers)
        zeros = sum(layer["weights"] * layer["sparsity"] for layer in work.layers)
        coverage = f"quantised {coverage_of(targets, skipped, f' to {config.bits} bits')}"
        draft.result = {
            "coverage": coverage,
            "sparsity": round(zeros / weights, 6),
            "calibration_tokens": 0 if tokens is None else int(tokens.numel()),
            "weights_bytes": output.size_bytes,
            "layers": work.layers,
        }
        logger.info("%s, %.1f %% of their weights zero", coverage, 100 * zeros / weights)
    return Artifact.open(out)


def _experts_apart(config: QuantizeConfig, folder: Path, network: Any) -> str | None:
    """Return a parameter that holds all experts in memory and not on disk, where the format cannot have any."""
    if config.format != "compressed-tensors":
        return None
    fused = {f"{t.module}.{t.parameter}" for t in find_targets(network)[0] if t.index is not None}
    names = DiskNames(network, Checkpoint(folder)).parameter_of
    return next((parameter for name, parameter in names.items() if parameter in fused and name != parameter), None)


def _layouts(
    scheme: Scheme, source: Checkpoint, names: DiskNames, targets: list[Target]
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Return the layouts of the model's files and of the starting weights."""
    quantised = {f"{target.module}.weight" for target in targets}
    layout: dict[str, Layout] = {}
    start: dict[str, Layout] = {}
    for name, entry in source.entries.items():
        if names.parameter_of[name] not in quantised:
            layout[name] = (entry.dtype, entry.shape)
            continue
        stored = scheme.layout((entry.shape[0], entry.shape[1]), scheme.scale_dtype(entry.dtype))
        layout |= {f"{name.removesuffix('.weight')}.{suffix}": value for suffix, value in stored.items()}
        start[name] = (torch.int8, entry.shape)
    return layout, start


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
    quantised = {target.module for target in work.targets}
    ignore = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n not in quantised]
    config = read_json(folder / "config.json")
    config["quantization_config"] = work.scheme.to_config(ignore)
    write_json(folder / "config.json", config)


def check(
    config: QuantizeConfig,
    folder: Path,
    network: Any,
    targets: list[Target],
    tokens: torch.Tensor | None,
    sparsify: SparsifyConfig | None = None,
) -> None:
    """Refuse, all at once, what would only show in the middle of the work."""
    with Problems("quantize") as problems:
        if quantization_config(folder) is not None:
            problems.add(f"model {folder} is quantised already; give the float model")
        fused = [t for t in targets if t.index is not None]
        if split := _experts_apart(config, folder, network):
            problems.add(
                f"{split} lies on disk expert by expert. transformers takes the experts of a compressed model for "
                "compressed too, finds none, and opens it with random ones; keep this model sparse float"
            )
        elif fused:
            problems.add(
                f"{fused[0].module}.{fused[0].parameter} holds all experts in one tensor, which {config.format} cannot "
                f"express ({len(fused)} such matrices); leave them out with quantize.ignore: "
                f"['*.{fused[0].module.rpartition('.')[2]}.*']"
            )
        transposed = [t for t in targets if t.transposed and t.index is None]
        if transposed:
            problems.add(
                f"{transposed[0].name} is a Conv1D, stored [in, out], which {config.format} cannot express "
                f"({len(transposed)} such linears); leave them out with quantize.ignore, or keep the model sparse float"
            )
        plain = [t for t in targets if t.index is None and not t.transposed]
        shapes = {t: t.view(network).shape for t in plain}
        wrong = [t for t in plain if config.group_size is not None and shapes[t][1] % config.group_size]
        if wrong:
            listed = ", ".join(f"{t.name} ({shapes[t][1]})" for t in wrong[:5])
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            problems.add(
                f"group_size {config.group_size} does not divide the rows of {listed}{more}; choose one that does, "
                "null for whole rows, or leave them out with quantize.ignore"
            )
        if config.format == "gptq":
            for target in plain:
                rows, columns = shapes[target]
                if rows * config.bits % 32 or columns * config.bits % 32:
                    problems.add(
                        f"{target.name} [{rows}, {columns}] does not fill whole 32-bit words with {config.bits} bits, "
                        "which GPTQ's format needs; use quantize.format: compressed-tensors"
                    )
                    break
        if config.method == "gptq" and tokens is None:
            problems.add("method gptq needs calibration tokens; use rtn without them")
        if sparsify is not None and sparsify.mask is None and sparsify.method != "magnitude" and tokens is None:
            problems.add(f"sparsify.method {sparsify.method} needs calibration tokens")
        if tokens is not None:
            check_tokens(tokens, network, problems)
