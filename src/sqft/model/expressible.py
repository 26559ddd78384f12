"""Which models a quantised format can hold, and which folders of it stock transformers opens; checked before any work.

What a format cannot hold is found from the targets. What transformers cannot open is found by trying: the model is
opened as a user would open it, by `from_pretrained` with its quantiser, over tensors of the right names, dtypes and
shapes that hold no data (on the meta device). What transformers itself cannot do with an architecture shows so in a
fraction of a second: an `_init_weights` that reads the weight of a linear which is already compressed, names that it
takes for others and fills with random numbers.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sqft.model.names import DiskNames
from sqft.model.opening import hide_bars_of_compressed_tensors, quiet_transformers
from sqft.model.targets import every_matrix
from sqft.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from sqft.model.targets import Target
    from sqft.storage.checkpoint import Layout
    from sqft.storage.scheme import Scheme


def inexpressible(scheme: Scheme, folder: Path, network: PreTrainedModel, targets: list[Target]) -> list[str]:
    """Return everything that stands against writing a model's targets in a scheme, each with its remedy.

    Args:
        scheme: the form of the quantised weights.
        folder: the float model's folder.
        network: its skeleton.
        targets: the matrices to quantise.
    """
    modules = {t: network.get_submodule(t.module) for t in targets if t.index is None}
    linears = [t for t, module in modules.items() if isinstance(module, nn.Linear)]
    problems = [
        *_experts(scheme, folder, network, targets),
        *_other_than_linears(scheme, modules),
        *_misfits(scheme, network, linears),
    ]
    if scheme.format == "compressed-tensors" and not problems:
        source = Checkpoint(folder)
        layout, _ = layouts(scheme, source, DiskNames(network, source), targets)
        reason = opening_error(network, scheme.to_config(left_float(network, targets)), layout)
        if reason is not None:
            problems.append(
                f"transformers cannot open a {type(network).__name__} in {scheme.format} format ({reason}); keep this "
                "model sparse float, or use quantize.format: gptq, which sqft opens, and other tools where they know "
                "the architecture"
            )
    return problems


def _experts(scheme: Scheme, folder: Path, network: PreTrainedModel, targets: list[Target]) -> Iterator[str]:
    # All experts, not the targets: transformers decompresses them whether they were quantised or not.
    stacks = {f"{t.module}.{t.parameter}" for t in every_matrix(network)[0] if t.index is not None}
    names = DiskNames(network, Checkpoint(folder)).parameter_of
    apart = next((parameter for name, parameter in names.items() if parameter in stacks and name != parameter), None)
    if apart is not None and scheme.format == "compressed-tensors":
        yield (
            f"{apart} lies on disk expert by expert. transformers takes the experts of a compressed model for "
            "compressed too, finds none, and opens it with random ones; keep this model sparse float"
        )
        return
    fused = [t for t in targets if t.index is not None]
    if fused:
        patterns = sorted({_pattern_of(t, targets) for t in fused})
        yield (
            f"{fused[0].module}.{fused[0].parameter} holds all experts in one tensor, which {scheme.format} cannot "
            f"express ({len(fused)} such matrices); leave them out with quantize.ignore: {patterns}"
        )


def _pattern_of(target: Target, targets: list[Target]) -> str:
    """Return a pattern that takes an expert out, with all others of its module, and no linear inside that."""
    last = target.module.rpartition(".")[2]
    if target.parameter == "weight":
        return f"*.{last}"
    inside = any(t.index is None and t.module.startswith(f"{target.module}.") for t in targets)
    return f"*.{last}.{target.parameter}" if inside else f"*.{last}.*"


def _other_than_linears(scheme: Scheme, modules: Mapping[Target, nn.Module]) -> Iterator[str]:
    bare = [t for t, module in modules.items() if not isinstance(module, nn.Linear | Conv1D)]
    if bare:
        yield (
            f"{bare[0].name} is a parameter of a {type(modules[bare[0]]).__name__}, not a linear, which "
            f"{scheme.format} cannot express ({len(bare)} such); leave it out with quantize.ignore: "
            f"['*.{bare[0].name.rpartition('.')[2]}']"
        )
    transposed = [t for t, module in modules.items() if isinstance(module, Conv1D)]
    if transposed:
        yield (
            f"{transposed[0].name} is a Conv1D, stored [in, out], which {scheme.format} cannot express "
            f"({len(transposed)} such linears); leave them out with quantize.ignore, or keep the model sparse float"
        )


def _misfits(scheme: Scheme, network: PreTrainedModel, linears: list[Target]) -> Iterator[str]:
    shapes = {t: t.view(network).shape for t in linears}
    wrong = [t for t in linears if scheme.group_size is not None and shapes[t][1] % scheme.group_size]
    if wrong:
        listed = ", ".join(f"{t.name} ({shapes[t][1]})" for t in wrong[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        yield (
            f"group_size {scheme.group_size} does not divide the rows of {listed}{more}; choose one that does, "
            "null for whole rows, or leave them out with quantize.ignore"
        )
    if scheme.format == "gptq":
        for target, (rows, columns) in shapes.items():
            if rows * scheme.bits % 32 or columns * scheme.bits % 32:
                yield (
                    f"{target.name} [{rows}, {columns}] does not fill whole 32-bit words with {scheme.bits} bits, "
                    "which GPTQ's format needs; use quantize.format: compressed-tensors"
                )
                return


def left_float(network: PreTrainedModel, targets: list[Target]) -> list[str]:
    """Return the names of the linears that are not quantised, anywhere in the model."""
    quantised = {target.module for target in targets}
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n not in quantised]


def layouts(
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


def opening_error(network: PreTrainedModel, quantization: dict[str, Any], layout: Mapping[str, Layout]) -> str | None:
    """Return why transformers does not open a folder whole, None where it does.

    Args:
        network: the float model's skeleton.
        quantization: what config.json is going to say of the quantisation.
        layout: {on-disk name: (dtype, shape)} of all the tensors.
    """
    if torch.distributed.is_initialized():
        return None  # the first process has tried; compressed-tensors would wait here for the others
    config = deepcopy(network.config)
    config.quantization_config = quantization
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    hide_bars_of_compressed_tensors()
    try:
        with quiet_transformers(), _silent():
            _, found = cast("Any", type(network)).from_pretrained(
                None, config=config, state_dict=tensors, device_map={"": "meta"}, output_loading_info=True
            )
    except Exception as error:  # a model's own code may raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    lost = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    return f"it finds no {', '.join(lost[:3])} and fills them with random numbers" if lost else None


@contextmanager
def _silent() -> Iterator[None]:
    """Hide transformers' report of a loading."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
