"""The integer grid of a quantised weight: the only place where a code is decided.

    q = clamp(round(W / s) + z, 0, 2ⁿ − 1)        Ŵ = s · (q − z)        (SQFT equations 3 and 4)

Shapes: O out features, I in features, G groups of I / G columns. Everything is computed in float32 with autocast off;
other libraries only pack the codes. A grid always contains 0: the range of a group is widened to include it and the
zero point is an integer inside the grid, so a pruned weight is exactly the code z and dequantises to exactly 0.

Scales are rounded to the dtype they are stored in when the grid is made, before any code is chosen: a code chosen
with a finer scale than the file holds would be another weight after loading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sqft.errors import InputError, NumericalError

BITS = (2, 3, 4, 8)
STRETCH = 2**23
"""Weights quantised at a time, in whole rows: a float32 copy of them takes 32 MiB."""
STRETCH_ON_CARD = 2**27
"""The same on a card, where a column loop costs its number of launches, however tall the weight: 512 MiB."""


def stretches(weight_OI: torch.Tensor, most: int | None = None) -> list[slice]:
    """Return stretches of rows, each of at most `most` weights (None: as suits the device), or of one row."""
    if most is None:
        most = STRETCH if weight_OI.device.type == "cpu" else STRETCH_ON_CARD
    rows, columns = weight_OI.shape
    step = max(1, most // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight [O, I].

    Attributes:
        scale_OG: positive, in the dtype it is stored in.
        zero_OG: uint8, the code that dequantises to 0.
        bits: n.
        columns: I.
        symmetric: every zero point is 2ⁿ⁻¹ and is not stored.
    """

    scale_OG: torch.Tensor
    zero_OG: torch.Tensor
    bits: int
    columns: int
    symmetric: bool

    @classmethod
    def fit(
        cls,
        weight_OI: torch.Tensor,
        *,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        dtype: torch.dtype,
        least_zero: int = 0,
    ) -> Grid:
        """Return the grid that spans each group's values, min to max.

        Args:
            weight_OI: [O, I], any float dtype.
            bits: 2, 3, 4 or 8.
            group_size: columns that share a scale; None is the whole row.
            symmetric: one code for zero in the middle of the grid; the range is ± the largest magnitude.
            dtype: what the scales are stored in.
            least_zero: smallest zero point, 1 where the stored form has no 0: the range is then widened downwards.

        Raises:
            InputError: the group size does not divide the row.
            NumericalError: a weight is NaN or infinite.
        """
        rows, columns = weight_OI.shape
        group_size = columns if group_size is None else group_size
        if columns % group_size:
            raise InputError(f"group size {group_size} does not divide rows of {columns} weights")
        grouped = weight_OI.float().reshape(rows, columns // group_size, group_size)
        low, high = grouped.amin(dim=-1).clamp_(max=0), grouped.amax(dim=-1).clamp_(min=0)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise NumericalError("a weight to quantise is NaN or Inf")
        top, middle = 2**bits - 1, 2 ** (bits - 1)
        span = 2 * torch.maximum(-low, high) if symmetric else high - low
        if least_zero and not symmetric:
            span = torch.maximum(span, high * (top / (top - least_zero)))
        # A scale that the stored dtype would round to 0 or to infinity is brought to its nearest usable value.
        limits = torch.finfo(dtype)
        scale = (span / top).clamp_(limits.tiny, limits.max)
        scale = torch.where(span == 0, torch.ones_like(scale), scale).to(dtype)
        if symmetric:
            zero = torch.full_like(low, middle)
        else:
            zero = (-low / scale.float()).round_().clamp_(least_zero, top)
            zero = torch.where(span == 0, torch.full_like(zero, middle), zero)
        return cls(scale, zero.to(torch.uint8), bits, columns, symmetric)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale_OG.shape[1]

    def steps(self, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (scale, lowest, highest), float32 [rows, G, 1]: a weight is q − z steps, of lowest to highest.

        Made when asked for and not kept: they would add 12 bytes a group to a packed weight's memory.
        """
        zero = self.zero_OG[rows].float().unsqueeze(-1)
        return self.scale_OG[rows].float().unsqueeze(-1), -zero, (2**self.bits - 1) - zero

    def quantize(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the codes q, uint8 [O, I], of a weight by rounding to nearest."""
        with torch.autocast(weight_OI.device.type, enabled=False):
            scale, low, high = self.steps()
            position = self._grouped(weight_OI.float()).div(scale).round_()
            position = torch.minimum(torch.maximum(position, low), high)
            return position.sub_(low).to(torch.uint8).flatten(1)

    def dequantize(self, codes_OI: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return Ŵ = s · (q − z), rounded once to `dtype`."""
        with torch.autocast(codes_OI.device.type, enabled=False):
            scale, low, _ = self.steps()
            return self._grouped(codes_OI.float()).add_(low).mul_(scale).flatten(1).to(dtype)

    def zero_codes(self) -> torch.Tensor:
        """Return the code of a zero weight at every position, uint8 [O, I]."""
        return self.zero_OG.repeat_interleave(self.group_size, dim=1)

    def offsets(self, weight_OI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
        """Return where in its code's bin each weight lies, int8 in 1/256 of a step, clamped into the bin.

        Clamped to ± 127/256, code and offset together round to the code by construction.
        """
        scale, low, _ = self.steps()
        inside = self._grouped(weight_OI.float()).div(scale) - self._grouped(codes_OI.float()).add_(low)
        return inside.mul_(256).round_().clamp_(-127, 127).to(torch.int8).flatten(1)

    def rows(self, rows: slice) -> Grid:
        """Return the grid of some of the rows."""
        return Grid(self.scale_OG[rows], self.zero_OG[rows], self.bits, self.columns, self.symmetric)

    def _grouped(self, weight_OI: torch.Tensor) -> torch.Tensor:
        grouped: torch.Tensor = weight_OI.unflatten(1, (self.scale_OG.shape[1], -1))
        return grouped


def storage_bits(bits: int) -> int:
    """Return the bits a code takes in memory: 3-bit codes are kept in half bytes, which unpack without shifting."""
    return 4 if bits == 3 else bits


def pack_codes(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into bytes [O, W], W = ceil(I · b / 8) and b from :func:`storage_bits`.

    Byte j holds columns j, W + j, 2 W + j and so on, from its lowest bits up: unpacking writes whole stretches of
    columns, which is several times faster than neighbours in one byte.
    """
    width = storage_bits(bits)
    planes = 8 // width
    padded = torch.nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % planes)).unflatten(1, (planes, -1))
    packed: torch.Tensor = padded[:, 0].clone()
    for plane in range(1, planes):
        packed |= padded[:, plane] << (width * plane)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Undo :func:`pack_codes`, as [O, I] of any dtype, float32 for arithmetic."""
    width = storage_bits(bits)
    rows, step = packed.shape
    codes: torch.Tensor = torch.empty(rows, step * (8 // width), dtype=dtype, device=packed.device)
    for plane in range(8 // width):
        codes[:, plane * step : (plane + 1) * step] = (packed >> (width * plane)).bitwise_and_(2**width - 1)
    return codes[:, :columns]


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen weight that stays packed, and the point from which quantisation-aware training starts.

    Attributes:
        packed: codes from :func:`pack_codes`, uint8.
        grid: scales and zero points.
        dtype: what the weight is dequantised to.
        start: None (the dequantised codes), int8 [O, I] offsets inside the codes' bins, or a float weight [O, I].
    """

    packed: torch.Tensor
    grid: Grid
    dtype: torch.dtype
    start: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[O, I]."""
        return torch.Size((self.packed.shape[0], self.grid.columns))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return it on a device."""
        grid = replace(self.grid, scale_OG=self.grid.scale_OG.to(device), zero_OG=self.grid.zero_OG.to(device))
        start = None if self.start is None else self.start.to(device)
        return QuantizedWeight(self.packed.to(device), grid, self.dtype, start)

    def codes(self) -> torch.Tensor:
        """Return the codes, uint8 [O, I]."""
        return unpack_codes(self.packed, self.grid.bits, self.grid.columns, torch.uint8)

    def start_steps(self, rows: slice) -> torch.Tensor:
        """Return the starting weight of some rows in steps of the grid, W_start / s, float32 [rows, G, I / G]."""
        scale, low, _ = self.grid.steps(rows)
        if self.start is not None and self.start.is_floating_point():
            return self._grouped(self.start[rows].float()) / scale
        codes = unpack_codes(self.packed[rows], self.grid.bits, self.grid.columns)
        position = self._grouped(codes).add_(low)
        if self.start is not None:
            position.add_(self._grouped(self.start[rows]), alpha=1 / 256)
        return position

    def dequantize_rows(self, rows: slice) -> torch.Tensor:
        """Return Ŵ of some rows, float32."""
        scale, low, _ = self.grid.steps(rows)
        codes = unpack_codes(self.packed[rows], self.grid.bits, self.grid.columns)
        return self._grouped(codes).add_(low).mul_(scale).flatten(1)

    def _grouped(self, rows_OI: torch.Tensor) -> torch.Tensor:
        grouped: torch.Tensor = rows_OI.unflatten(1, (self.grid.scale_OG.shape[1], -1))
        return grouped
