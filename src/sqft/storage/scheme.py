"""How the quantised linears of one model are stored: compressed-tensors `pack-quantized` or GPTQ.

A linear `X` whose weight is [O, I] is stored as

    pack-quantized   X.weight_packed int32 [O, I·n/32], X.weight_scale [O, G], X.weight_shape [2],
                     X.weight_zero_point int32 [O·n/32, G] where asymmetric; codes count from −2ⁿ⁻¹
    GPTQ             X.qweight int32 [I·n/32, O], X.scales float16 [G, O], X.qzeros int32 [G, O·n/32],
                     X.g_idx int32 [I]; version 1 stores zero points minus one, so it cannot hold a zero point of 0

compressed-tensors' own functions pack and unpack the integers of both: GPTQ's bit order is the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from sqft.core.grid import Grid, stretches

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqft.storage.checkpoint import Layout

FormatName = Literal["compressed-tensors", "gptq"]
_PACKED_AT_ONCE = 2**20  # weights


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
        words = read(self.suffixes[0])
        codes = self._unpack(words.T if self.format == "gptq" else words, shape[1])
        return codes, self.decode_grid(read, shape)

    def decode_grid(self, read: Callable[[str], torch.Tensor], shape: tuple[int, int]) -> Grid:
        """Return the grid alone; arguments as of :meth:`decode`."""
        rows, columns = shape
        if self.format == "gptq":
            zero = self._unpack(read("qzeros"), rows).T.contiguous()
            if self.gptq_version == 1:
                zero = zero + 1
            return Grid(read("scales").T.contiguous(), zero, self.bits, columns, self.symmetric)
        scale = read("weight_scale")
        if self.symmetric:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=scale.device)
        else:
            zero = self._unpack(read("weight_zero_point").T, rows).T.contiguous()
        return Grid(scale, zero, self.bits, columns, self.symmetric)

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes, uint8 [R, C], as int32 words [R, C·n/32]; in stretches: each code becomes an int32 and more."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        words = torch.empty(codes.shape[0], self._words(codes.shape[1]), dtype=torch.int32, device=codes.device)
        for rows in stretches(codes, _PACKED_AT_ONCE):
            signed = (codes[rows].to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
            words[rows] = pack_to_int32(signed, self.bits)
        return words

    def _unpack(self, words: torch.Tensor, columns: int) -> torch.Tensor:
        """Undo :meth:`_pack`."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        codes = torch.empty(words.shape[0], columns, dtype=torch.uint8, device=words.device)
        for rows in stretches(codes, _PACKED_AT_ONCE):
            part = words[rows]
            signed = unpack_from_int32(part, self.bits, torch.Size((part.shape[0], columns)))
            codes[rows] = signed.to(torch.int16) + 2 ** (self.bits - 1)
        return codes
