"""Draws the rooms of `src/sqft` and their imports as docs/figures/structure.svg: `make picture`.

The rooms and what is in them are the rows of the table in CONTRIBUTING.md, the imports those that grimp finds in the
code, those inside functions included. Rooms stand on a diagonal; a dot on a room's line marks one that it imports. All
dots lie above the diagonal because imports point one way; any other import is an error.
"""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

import grimp

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "figures" / "structure.svg"
_PITCH, _FIRST, _TOP = 44, 480, 16
_STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; --page: #fff; --band: #f5f7fa;
  --ink: #1f2933; --muted: #52606d; --line: #b6c1cc; --accent: #1d5fa8; --box: #e8f0fa; }
@media (prefers-color-scheme: dark) { svg { --page: #14181d; --band: #1b2027; --ink: #e6eaee; --muted: #a6b1bc;
  --line: #4b5866; --accent: #7db4f0; --box: #20303f; } }
.page { fill: var(--page) } .band { fill: var(--band) } .line { stroke: var(--line); stroke-width: 1.5; fill: none }
.dot { fill: var(--accent) } .box { fill: var(--box); stroke: var(--accent) } .what { fill: var(--muted) }
.name { fill: var(--ink); font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; text-anchor: middle }
"""


class Room(NamedTuple):
    """A row of the table: modules or packages directly under `sqft`, and what is in them."""

    names: tuple[str, ...]
    what: str

    @property
    def label(self) -> str:
        """The names as one text."""
        return ", ".join(self.names)


def rooms() -> list[Room]:
    """Return the rows of CONTRIBUTING's table, top to bottom."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| room |")) + 2
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        names, what = (cell.strip() for cell in line.strip("|").split("|")[:2])
        found.append(Room(tuple(re.findall(r"`([^`]+)`", names)), what.replace("`", "")))
    return found


def imports(rows: list[Room]) -> set[tuple[int, int]]:
    """Return (importing room, imported room) as numbers of rows.

    Raises:
        ValueError: a module is in no room, a room is not there, or an import points upwards.
    """
    graph = grimp.build_graph("sqft", exclude_type_checking_imports=True, cache_dir=None)
    row_of = {name: number for number, room in enumerate(rows) for name in room.names}
    absent = [name for name in row_of if not (ROOT / "src" / "sqft" / name).exists()]
    homeless = {file_name(module) for module in graph.modules} - set(row_of)
    if absent or homeless:
        raise ValueError(
            f"the table in CONTRIBUTING.md names what is not in src/sqft: {absent}; or lacks: {sorted(homeless)}"
        )
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = row_of[file_name(module)], row_of[file_name(imported)]
            if one > other:
                raise ValueError(f"{module} imports {imported}, which stands above it in the table of CONTRIBUTING.md")
            if one != other:
                found.add((one, other))
    return found


def file_name(module: str) -> str:
    """Return the name directly under src/sqft that holds a module: `core/`, `plan.py`, `__init__.py`."""
    _, _, rest = module.partition(".")
    name = rest.partition(".")[0] or "__init__"
    return f"{name}/" if (ROOT / "src" / "sqft" / name).is_dir() else f"{name}.py"


def lines_of(room: Room) -> int:
    """Return the lines of Python in a room."""
    places = [ROOT / "src" / "sqft" / name for name in room.names]
    files = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def table() -> str:
    """Return the rooms as a Markdown table with the lines of each."""
    rows = [(room, lines_of(room)) for room in rooms()]
    body = [f"| {', '.join(f'`{name}`' for name in room.names)} | {room.what} | {lines:,} |" for room, lines in rows]
    total = f"| all | | {sum(lines for _, lines in rows):,} |"
    return "\n".join(["| room | what is in it | lines |", "|---|---|---:|", *body, total])


def draw() -> str:
    """Return the picture as SVG."""
    rows = rooms()
    edges = imports(rows)
    width, height = _FIRST + _PITCH * (len(rows) - 1) + 24, _TOP + _PITCH * len(rows) + 12
    shapes = [f'<rect class="page" width="{width}" height="{height}" rx="8"/>']
    shapes += [
        f'<rect class="band" x="8" y="{_y(number) - _PITCH // 2}" width="{width - 16}" height="{_PITCH}" rx="4"/>'
        for number in range(0, len(rows), 2)
    ]
    for number in range(len(rows)):
        to, by = [b for a, b in edges if a == number], [a for a, b in edges if b == number]
        if to:
            shapes.append(f'<path class="line" d="M{_x(number)} {_y(number)}H{_x(max(to))}"/>')
        if by:
            shapes.append(f'<path class="line" d="M{_x(number)} {_y(min(by))}V{_y(number)}"/>')
    for one, other in sorted(edges):
        title = escape(f"{rows[one].label} imports {rows[other].label}")
        shapes.append(f'<circle class="dot" cx="{_x(other)}" cy="{_y(one)}" r="4.5"><title>{title}</title></circle>')
    for number, room in enumerate(rows):
        shapes += _box(room, _x(number), _y(number))
    key = _y(len(rows) - 4) + 4
    shapes.append(f'<circle class="dot" cx="{_FIRST - 60}" cy="{key - 4}" r="4.5"/>')
    shapes.append(f'<text class="what" x="{_FIRST - 48}" y="{key}">the room of this row imports the room below</text>')
    said = "; ".join(
        f"{room.label} imports {', '.join(rows[b].label for a, b in sorted(edges) if a == number) or 'nothing'}"
        for number, room in enumerate(rows)
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    label = f"<title>The rooms of sqft and their imports</title>\n<desc>{escape(said)}</desc>"
    return "\n".join([head, label, f"<style>{_STYLE}</style>", *shapes, "</svg>"]) + "\n"


def _x(number: int) -> int:
    return _FIRST + _PITCH * number


def _y(number: int) -> int:
    return _TOP + _PITCH // 2 + _PITCH * number


def _box(room: Room, x: int, y: int) -> list[str]:
    """Return a room's box, which ends at its place on the diagonal, and the words left of it."""
    right, wide = x + 14, 7.3 * len(room.label) + 22
    words = textwrap.wrap(room.what, 50)
    first = y + 4 - 7.5 * (len(words) - 1)
    return [
        *(f'<text class="what" x="20" y="{first + 15 * n:g}">{escape(line)}</text>' for n, line in enumerate(words)),
        f'<rect class="box" x="{right - wide:.1f}" y="{y - 13}" width="{wide:.1f}" height="26" rx="5"/>',
        f'<text class="name" x="{right - wide / 2:.1f}" y="{y + 4}">{escape(room.label)}</text>',
    ]


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
