"""Blocks of GGUF files that hold an integer grid exactly.

A block is 32 neighbours of a row. Its bytes are float16 numbers d (and m), then the integers:

    Q4_0   w = d · k       k from −8 to 7          18 bytes
    Q4_1   w = d · c + m   c from 0 to 15          20 bytes
    Q5_0   w = d · k       k from −16 to 15        22 bytes
    Q8_0   w = d · k       k from −128 to 127      34 bytes

A weight of ours is s · (q − z), so d = s and k = q − z wherever float16 holds s. In Q4_1, m = −s · z may need one bit
more than float16 has (s of 8 bits, z odd and 9 or more). The block is then written backwards: d = −s, c = 15 − q and
m = s · (15 − z), where 15 − z is small. One of the two is exact for every s of 8 bits from 2⁻¹⁷ to below 2¹³.

Nothing is rounded here: a grid that no block holds is refused. Shapes: O out features, I in features, G groups of
I / G columns, B blocks of 32 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sqft.errors import Problems

if TYPE_CHECKING:
    from sqft.core.grid import Grid

BLOCK = 32
_TOP = 15


@dataclass(frozen=True)
class BlockType:
    """One way of storing 32 weights.

    Attributes:
        low: the least q − z.
        high: the greatest.
        size: bytes of a block.
    """

    low: int
    high: int
    size: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / BLOCK


TYPES = {
    "Q4_0": BlockType(-8, 7, 18),
    "Q4_1": BlockType(-_TOP, _TOP, 20),
    "Q5_0": BlockType(-16, 15, 22),
    "Q8_0": BlockType(-128, 127, 34),
}
"""Smallest first. What fits one fits each that comes after it, but that Q4_1 holds no more than 16 codes."""


def exact_types(codes_OI: torch.Tensor, grid: Grid) -> list[str]:
    """Return the types that hold a weight exactly, smallest first.

    Args:
        codes_OI: uint8.
        grid: its scales and zero points.

    Raises:
        InputError: none does; each reason, and the setting that would fit.
    """
    low, high = _range(codes_OI, grid)
    found = [name for name, kind in TYPES.items() if kind.low <= low and high <= kind.high]
    if "Q4_1" in found and (2**grid.bits - 1 > _TOP or not bool((_forward(grid) | _backward(grid)).all())):
        found.remove("Q4_1")
    inexact = int((~_exact(grid.scale_OG.float())).sum())
    with Problems("no GGUF block holds it exactly") as problems:
        if grid.group_size % BLOCK:
            problems.add(
                f"groups of {grid.group_size} weights share a scale, and a block is {BLOCK}; quantise with a "
                f"group_size that is a multiple of {BLOCK}, such as 64"
            )
        if inexact:
            dtype = str(grid.scale_OG.dtype).removeprefix("torch.")
            remedy = "quantise with format gptq, whose scales are float16"
            if grid.scale_OG.dtype == torch.float32:
                remedy = f"save the float model as bfloat16 and quantise it again, or {remedy}"
            problems.add(
                f"{inexact} of {grid.scale_OG.numel()} scales, stored as {dtype}, are no float16 numbers, which blocks "
                f"have; {remedy}"
            )
        if not found:
            widest = TYPES["Q8_0"]
            problems.add(
                f"weights of {grid.bits} bits lie {low} to {high} steps from zero, and the widest block, Q8_0, holds "
                f"{widest.low} to {widest.high}; quantise with symmetric: true"
            )
    return found


def encode(codes_OI: torch.Tensor, grid: Grid, name: str) -> torch.Tensor:
    """Return a weight as blocks, uint8 [O, B · size]; `name` is one of :func:`exact_types`."""
    numbers: tuple[torch.Tensor, ...]
    scale_OB, zero_OB = _spread(grid.scale_OG.float(), grid), _spread(grid.zero_OG, grid).short()
    codes_OBJ = codes_OI.short().unflatten(1, (-1, BLOCK))
    if name == "Q4_1":
        back = ~_spread(_forward(grid), grid)
        numbers = (
            torch.where(back, -scale_OB, scale_OB),
            torch.where(back, scale_OB * (_TOP - zero_OB), -scale_OB * zero_OB),
        )
        stored = torch.where(back.unsqueeze(-1), _TOP - codes_OBJ, codes_OBJ)
    else:
        numbers = (scale_OB,)
        stored = codes_OBJ - zero_OB.unsqueeze(-1)
        if name != "Q8_0":
            stored -= TYPES[name].low
    heads = [number.half().unsqueeze(-1).view(torch.uint8) for number in numbers]
    if name == "Q5_0":
        fifth = (stored >> 4).unflatten(2, (4, 8)) << torch.arange(8, dtype=torch.int16)
        heads.append(fifth.sum(-1).to(torch.uint8))
    body = stored.to(torch.uint8)
    if name != "Q8_0":
        half = BLOCK // 2
        body = (body[..., :half] & 15) | (body[..., half:] & 15) << 4
    return torch.cat([*heads, body], dim=2).flatten(1)


def _range(codes_OI: torch.Tensor, grid: Grid) -> tuple[int, int]:
    """Return the least and greatest q − z."""
    grouped = codes_OI.unflatten(1, (grid.scale_OG.shape[1], -1))
    zero = grid.zero_OG.short()
    return int((grouped.amin(-1).short() - zero).min()), int((grouped.amax(-1).short() - zero).max())


def _exact(values: torch.Tensor) -> torch.Tensor:
    """Tell which float32 values are float16 numbers."""
    return values.half().float() == values


def _forward(grid: Grid) -> torch.Tensor:
    """Tell of which groups Q4_1 holds −s · z, bool [O, G]."""
    return _exact(-grid.scale_OG.float() * grid.zero_OG)


def _backward(grid: Grid) -> torch.Tensor:
    """Tell of which groups Q4_1 holds s · (15 − z), bool [O, G]."""
    return _exact(grid.scale_OG.float() * (_TOP - grid.zero_OG.short()))


def _spread(values_OG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return a group's value for each of its blocks, [O, B]."""
    return values_OG.repeat_interleave(grid.group_size // BLOCK, dim=1)
