"""The quantised weights of a model folder, and what its config.json says of them.

How they are stored is :mod:`sqft.storage.scheme`. What cannot be read raises an error that names it, before any work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from sqft.core.grid import BITS, Grid
from sqft.disk import read_json
from sqft.errors import InputError, Problems
from sqft.storage.checkpoint import WEIGHTS, Checkpoint
from sqft.storage.scheme import FormatName, Scheme


def quantization_config(folder: str | Path) -> dict[str, Any] | None:
    """Return what a model folder says of its quantisation, None for a float model.

    Raises:
        InputError: it says so in AutoGPTQ's first format, which transformers does not read, or says nothing that can be
            understood.
    """
    value = read_json(Path(folder) / "config.json").get("quantization_config")
    if value is None:
        _refuse_old_gptq(Path(folder))
    elif not isinstance(value, dict):
        raise InputError(f"model {folder}: its config.json has quantization_config {value!r}, which is no object")
    return cast("dict[str, Any] | None", value)


def _refuse_old_gptq(folder: Path) -> None:
    """Refuse quantised weights whose settings lie in a file beside config.json; transformers would take them for float.

    Raises:
        InputError: says how to convert the folder.
    """
    file = folder / "quantize_config.json"
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not file.is_file() or not any(_has_codes(folder / name) for name in weights):
        return
    old = read_json(file)
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        **{key: old[key] for key in ("bits", "group_size", "sym", "desc_act") if key in old},
        "checkpoint_format": old.get("checkpoint_format", "gptq"),
    }
    name = "" if weights == [WEIGHTS] else f", and name {', '.join(weights)} {WEIGHTS}"
    raise InputError(
        f"model {folder}: is quantised in AutoGPTQ's first format, its settings in quantize_config.json alone, which "
        f'transformers does not read; put "quantization_config": {json.dumps(settings)} into config.json{name}'
    )


def _has_codes(file: Path) -> bool:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return any(name.endswith(".qweight") for name in tensors.keys())
    except (SafetensorError, OSError):
        return False  # whoever reads the weights says what is wrong with them


def parse_scheme(config: dict[str, Any], where: str) -> Scheme:
    """Return the scheme of a `quantization_config`.

    Raises:
        InputError: a way of quantising that we do not read; says which, and what can be read.
    """
    method = config.get("quant_method")
    if method == "gptq":
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        stored = config.get("bits", 4), config.get("group_size", 128), config.get("sym", True)
        return _scheme("gptq", *stored, where, version)
    if method != "compressed-tensors":
        raise InputError(
            f"{where}: is quantised by {method!r}, which sqft does not read; it reads compressed-tensors "
            "pack-quantized and GPTQ. Quantise the float model with sqft quantize, or convert it"
        )
    weights = _parse_compressed_tensors(config, where)
    group_size = weights.get("group_size") if weights["strategy"] == "group" else None
    return _scheme("compressed-tensors", weights.get("num_bits"), group_size, weights.get("symmetric", True), where)


def _scheme(name: FormatName, bits: Any, group_size: Any, symmetric: Any, where: str, version: int = 1) -> Scheme:
    """Return the scheme that a config's values are.

    Raises:
        InputError: they are none; every problem.
    """
    whole_row = group_size in (-1, None)
    with Problems(where) as problems:
        if type(bits) is not int or bits not in BITS:
            problems.add(f"has {bits}-bit weights; sqft reads {', '.join(map(str, BITS))}")
        if not whole_row and (type(group_size) is not int or group_size < 1):
            problems.add(f"has groups of {group_size!r} weights; give a number above 0, or -1 for the whole row")
        if not isinstance(symmetric, bool):
            problems.add(f"says {symmetric!r} of whether its grid is symmetric, which is neither true nor false")
    return Scheme(name, bits, None if whole_row else group_size, symmetric, version)


def _parse_compressed_tensors(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what a config says of the weights.

    Raises:
        InputError: they are stored as we do not read them; every problem.
    """
    given = config.get("config_groups")
    groups = [group for group in given.values() if isinstance(group, dict)] if isinstance(given, dict) else []
    found = groups[0].get("weights") if groups else None
    weights = found if isinstance(found, dict) else {}
    formats = {str(place.get("format")) for place in (config, *groups)} - {"None"}
    with Problems(f"{where}: its compressed-tensors weights cannot be read") as problems:
        if formats != {"pack-quantized"}:
            problems.add(f"the format is {', '.join(sorted(formats))}; sqft reads pack-quantized")
        if len(groups) != 1:
            problems.add(f"it has {len(groups)} config groups; sqft reads models with one")
        if weights.get("type", "int") != "int":
            problems.add(f"the weights are of type {weights['type']}; sqft reads int")
        if weights.get("strategy") not in ("group", "channel"):
            problems.add(f"the strategy is {weights.get('strategy')!r}; sqft reads group and channel")
        if weights.get("actorder") in ("group", "dynamic"):
            problems.add("columns are regrouped by activity (actorder group); sqft reads static or no order")
        if any(group.get("input_activations") for group in groups):
            problems.add("activations are quantised too; sqft reads weight-only models")
        if config.get("sparsity_config"):
            problems.add("it has a sparsity_config, a format that was dropped; decompress it first")
        if config.get("transform_config"):
            problems.add("its weights are rotated (transform_config); sqft reads plain ones")
        if config.get("kv_cache_scheme"):
            problems.add("its key-value cache is quantised too (kv_cache_scheme); sqft reads weight-only models")
    return weights


class PackedCheckpoint:
    """The quantised weights of a model folder, under the names (`X.weight`) that they had as floats.

    Raises:
        InputError: not quantised, or the stored tensors contradict the config (bits, group size, a missing zero
            point); every problem.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        config = quantization_config(folder)
        self.checkpoint = Checkpoint(folder)
        if config is None:
            raise InputError(f"model {folder}: is not quantised; make it so with sqft quantize")
        self.scheme = parse_scheme(config, f"model {folder}")
        self.shapes: dict[str, tuple[int, int]] = {}
        codes = self.scheme.suffixes[0]
        found = [n.removesuffix(f".{codes}") for n in self.checkpoint.entries if n.endswith(f".{codes}")]
        with Problems(f"model {folder}") as problems:
            if not found:
                problems.add(f"its config says {self.scheme.format}, but no tensor is named *.{codes}")
            for prefix in found:
                self._check(prefix, problems)

    def _check(self, prefix: str, problems: Problems) -> None:
        """Compare a linear's stored tensors with what bits and group size demand."""
        scheme, entries = self.scheme, self.checkpoint.entries
        missing = [s for s in scheme.suffixes if f"{prefix}.{s}" not in entries]
        if missing:
            problems.add(f"{prefix} has no {', '.join(missing)}, which {scheme.format} needs")
            return
        stored = {suffix: entries[f"{prefix}.{suffix}"] for suffix in scheme.suffixes}
        scales = stored[scheme.suffixes[1]]
        for suffix, entry in stored.items():
            if entry.dtype.is_floating_point != (entry is scales) or (entry is scales and entry.dtype.itemsize < 2):
                problems.add(f"{prefix}.{suffix} is stored as {entry.dtype}; {scheme.format} has another there")
                return
        found = self._shape(prefix)
        if found is None:
            problems.add(f"{prefix}: what it holds says no shape of two axes; get the model again")
            return
        rows, columns = found
        if columns % (scheme.group_size or columns):
            problems.add(f"{prefix}: groups of {scheme.group_size} do not divide rows of {columns} weights")
            return
        wanted = scheme.layout((rows, columns), scales.dtype)
        for suffix, (dtype, shape) in wanted.items():
            entry = stored[suffix]
            if entry.shape != shape or (dtype == torch.int32 and suffix != "g_idx" and entry.dtype != dtype):
                problems.add(
                    f"{prefix}.{suffix} has shape {list(entry.shape)} and is {entry.dtype}; a weight [{rows}, "
                    f"{columns}] with {scheme.bits} bits and groups of {scheme.group_size or columns} needs "
                    f"{list(shape)} and {dtype}"
                )
                return
        if scheme.format == "gptq":
            group = scheme.group_size or columns
            if not torch.equal(self.checkpoint.read(f"{prefix}.g_idx").long(), torch.arange(columns) // group):
                problems.add(f"{prefix}: columns are regrouped by activity (desc_act); sqft reads contiguous groups")
                return
        self.shapes[f"{prefix}.weight"] = (rows, columns)

    def _shape(self, prefix: str) -> tuple[int, int] | None:
        """Return (O, I) of a weight, None where what is stored of it says none."""
        entries = self.checkpoint.entries
        if self.scheme.format == "gptq":
            axes = [*entries[f"{prefix}.scales"].shape[1:], *entries[f"{prefix}.g_idx"].shape]
        else:
            axes = [int(n) for n in self.checkpoint.read(f"{prefix}.weight_shape").flatten()[:3]]
        return (axes[0], axes[1]) if len(axes) == 2 and min(axes) > 0 else None

    def read(self, weight: str) -> tuple[torch.Tensor, Grid]:
        """Return (codes uint8 [O, I], grid) of a weight."""
        prefix = weight.removesuffix(".weight")
        return self.scheme.decode(lambda suffix: self.checkpoint.read(f"{prefix}.{suffix}"), self.shapes[weight])

    def grid(self, weight: str) -> Grid:
        """Return the grid of a weight; its codes are not read."""
        prefix = weight.removesuffix(".weight")
        return self.scheme.decode_grid(lambda suffix: self.checkpoint.read(f"{prefix}.{suffix}"), self.shapes[weight])

    def scale_dtype(self, weight: str) -> torch.dtype:
        """Return what a weight's scales are stored in."""
        return self.checkpoint.entries[f"{weight.removesuffix('.weight')}.{self.scheme.suffixes[1]}"].dtype

    def codes_name(self, weight: str) -> str:
        """Return the name of the tensor that holds a weight's codes."""
        return f"{weight.removesuffix('.weight')}.{self.scheme.suffixes[0]}"

    def stored_names(self) -> dict[str, str]:
        """Return {stored tensor: weight} for every tensor that is part of a quantised weight."""
        return {
            f"{weight.removesuffix('.weight')}.{suffix}": weight
            for weight in self.shapes
            for suffix in self.scheme.suffixes
        }
