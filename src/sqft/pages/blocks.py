"""The content of a page, without its layout: sections of blocks, and the cells of tables.

Each template has a branch for each class, found by its name: a new kind of block is a class here and a branch in each
template. Text is plain, code stands between backticks, and templates escape both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Text(NamedTuple):
    """A paragraph; `style` is a class of style.css. A legend stands in HTML alone, where charts are."""

    text: str
    style: str = ""


class Badge(NamedTuple):
    """A verdict, as a block or a cell; `state` is passed, failed or absent."""

    state: str
    text: str


class Items(NamedTuple):
    """A list; one with a title is boxed."""

    items: Sequence[str]
    title: str = ""


class Tiles(NamedTuple):
    """The numbers at the top of a page, each (what it is, the value, its unit or error, the file that it is from)."""

    tiles: Sequence[tuple[str, str, str, str]]


class Code(NamedTuple):
    """Code, in a language that code hosts know."""

    text: str
    language: str


class Figure(NamedTuple):
    """A chart (an SVG element of charts.py), in HTML alone: its numbers must stand in a table."""

    chart: str
    title: str = ""


class Cell(NamedTuple):
    """A cell of more than text: an error after it, small print below it, a tag, a bar of a length from 0 to 1."""

    text: str
    error: str = ""
    below: str = ""
    tag: str = ""
    bar: float | None = None


class Row(NamedTuple):
    """A row of a table; HTML has `note` in small print below its first cell, Markdown in a last column."""

    cells: Sequence[str | Cell | Badge]
    note: str = ""
    style: str = ""


class Table(NamedTuple):
    """A table; `notes` is the head of the rows' notes, without which Markdown leaves them out."""

    heads: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    notes: str = ""


class Folded(NamedTuple):
    """Blocks that a reader opens."""

    title: str
    blocks: Sequence[Block]


class Columns(NamedTuple):
    """Columns of blocks, side by side where the page is wide enough; empty ones are left out."""

    columns: Sequence[Sequence[Block]]

    @property
    def stacked(self) -> list[Block]:
        """The blocks one below another; what is folded beside a chart takes the place of the chart."""
        blocks = [block for column in self.columns for block in column]
        return [inner for block in blocks for inner in (block.blocks if isinstance(block, Folded) else [block])]


Block = Text | Badge | Items | Tiles | Code | Figure | Table | Folded | Columns


class Section(NamedTuple):
    """A part of a page; `key` is its anchor. One without blocks is left out."""

    key: str
    title: str
    blocks: Sequence[Block]


class Page(NamedTuple):
    """A page; `head` stands below its title, `name` above it."""

    title: str
    sections: Sequence[Section]
    head: Sequence[Block] = ()
    name: str = ""
