"""Quantised weights on disk: compressed-tensors `pack-quantized` and GPTQ, both read and written.

A linear `X` whose weight is [O, I] is stored as

    pack-quantized   X.weight_packed int32 [O, I·n/32], X.weight_scale [O, G], X.weight_shape [2],
                     X.weight_zero_point int32 [O·n/32, G] where asymmetric; codes count from −2ⁿ⁻¹
    GPTQ             X.qweight int32 [I·n/32, O], X.scales float16 [G, O], X.qzeros int32 [G, O·n/32],
                     X.g_idx int32 [I]; version 1 stores zero points minus one, so it cannot hold a zero point of 0

compressed-tensors' own functions pack and unpack the integers of both: GPTQ's bit order is the same. What a file cannot
hold, and what we cannot read, is refused by name before any work.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open

from sqft.core.grid import BITS, Grid, stretches
from sqft.disk import read_json
from sqft.errors import InputError, Problems
from sqft.storage.checkpoint import WEIGHTS, Checkpoint, Layout

if TYPE_CHECKING:
    from collections.abc import Callable

FormatName = Literal["compressed-tensors", "gptq"]
_PACKED_AT_ONCE = 2**20  # weights


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


@dataclass(frozen=True)
class Scheme:
    """How the quantised linears of one model are stored.

    Attributes:
        format: which of the two.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; None is the whole row.
        symmetric: all zero points are 2ⁿ⁻¹.
        gptq_version: 1 stores zero points minus one.
    """

    format: FormatName
    bits: int
    group_size: int | None
    symmetric: bool
    gptq_version: int = 1

    @property
    def least_zero(self) -> int:
        """The smallest zero point that can be stored."""
        return 1 if self.format == "gptq" and self.gptq_version == 1 else 0

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The names of a linear's stored tensors; the first holds the codes."""
        if self.format == "gptq":
            return "qweight", "scales", "qzeros", "g_idx"
        symmetric: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
        return symmetric if self.symmetric else (*symmetric, "weight_zero_point")

    def to_config(self, ignore: list[str]) -> dict[str, Any]:
        """Return the `quantization_config` of config.json.

        Args:
            ignore: names of the linears that stay float.
        """
        if self.format == "gptq":
            return {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": -1 if self.group_size is None else self.group_size,
                "sym": self.symmetric,
                "desc_act": False,
                "checkpoint_format": "gptq",
                "lm_head": False,
                **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in ignore}} if ignore else {}),
            }
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        weights = QuantizationArgs(
            num_bits=self.bits,
            type="int",
            symmetric=self.symmetric,
            strategy="channel" if self.group_size is None else "group",
            group_size=self.group_size,
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format="pack-quantized",
            quantization_status="compressed",
            ignore=ignore,
        )
        return cast("dict[str, Any]", config.model_dump(mode="json"))

    def layout(self, shape: tuple[int, ...], scale_dtype: torch.dtype) -> dict[str, Layout]:
        """Return {suffix: (dtype, shape)} of the stored tensors of a weight [O, I]."""
        rows, columns = shape
        groups = 1 if self.group_size is None else columns // self.group_size
        word = torch.int32
        if self.format == "gptq":
            return {
                "qweight": (word, (self._words(columns), rows)),
                "scales": (torch.float16, (groups, rows)),
                "qzeros": (word, (groups, self._words(rows))),
                "g_idx": (word, (columns,)),
            }
        stored = {
            "weight_packed": (word, (rows, self._words(columns))),
            "weight_scale": (scale_dtype, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
            "weight_zero_point": (word, (self._words(rows), groups)),
        }
        return {suffix: stored[suffix] for suffix in self.suffixes}

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return what scales are stored in."""
        return torch.float16 if self.format == "gptq" else model_dtype

    def _words(self, values: int) -> int:
        return math.ceil(values * self.bits / 32)

    def encode_codes(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """Return the stored form of codes, uint8 [O, I]: `weight_packed` or `qweight`."""
        words = self._pack(codes_OI)
        return words.T.contiguous() if self.format == "gptq" else words

    def encode(self, codes_OI: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
        """Return {suffix: tensor} of a quantised weight, whose zero points are `least_zero` or more."""
        stored = {self.suffixes[0]: self.encode_codes(codes_OI)}
        if self.format == "gptq":
            zero = grid.zero_OG.T.contiguous() - self.least_zero
            groups = torch.arange(grid.columns, dtype=torch.int32) // grid.group_size
            return {
                **stored,
                "scales": grid.scale_OG.T.contiguous(),
                "qzeros": self._pack(zero),
                "g_idx": groups,
            }
        stored["weight_scale"] = grid.scale_OG.contiguous()
        stored["weight_shape"] = torch.tensor(codes_OI.shape)
        if not self.symmetric:
            stored["weight_zero_point"] = self._pack(grid.zero_OG.T).T.contiguous()
        return stored

    def decode(self, read: Callable[[str], torch.Tensor], shape: tuple[int, int]) -> tuple[torch.Tensor, Grid]:
        """Return (codes uint8 [O, I], grid).

        Args:
            read: returns the stored tensor of a suffix.
            shape: (O, I).
        """
        rows, columns = shape
        if self.format == "gptq":
            codes = self._unpack(read("qweight").T, columns)
            zero = self._unpack(read("qzeros"), rows).T.contiguous()
            if self.gptq_version == 1:
                zero = zero + 1
            return codes, Grid(read("scales").T.contiguous(), zero, self.bits, columns, self.symmetric)
        codes = self._unpack(read("weight_packed"), columns)
        scale = read("weight_scale")
        if self.symmetric:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zero = self._unpack(read("weight_zero_point").T, rows).T.contiguous()
        return codes, Grid(scale, zero, self.bits, columns, self.symmetric)

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes, uint8 [R, C], as int32 words [R, C·n/32]; in stretches: each code becomes an int32 and more."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        words = torch.empty(codes.shape[0], self._words(codes.shape[1]), dtype=torch.int32)
        for rows in stretches(codes, _PACKED_AT_ONCE):
            signed = (codes[rows].to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
            words[rows] = pack_to_int32(signed, self.bits)
        return words

    def _unpack(self, words: torch.Tensor, columns: int) -> torch.Tensor:
        """Undo :meth:`_pack`."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        codes = torch.empty(words.shape[0], columns, dtype=torch.uint8)
        for rows in stretches(codes, _PACKED_AT_ONCE):
            part = words[rows]
            signed = unpack_from_int32(part, self.bits, torch.Size((part.shape[0], columns)))
            codes[rows] = signed.to(torch.int16) + 2 ** (self.bits - 1)
        return codes


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
