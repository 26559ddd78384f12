"""Small charts as HTML and inline SVG: no script, no request, one colour scheme for light and dark.

Every chart is drawn in percent of the width it gets, so text keeps its size on a narrow screen. Colours are classes
and CSS variables of style.css. A chart has a label for screen readers; its numbers stand in a table beside it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot.

    Attributes:
        label: what stands at its left.
        value: position, in the unit of the axis.
        stderr: half the length of its whisker, or None.
        text: the number as a reader sees it.
        style: CSS class of the mark.
    """

    label: str
    value: float
    stderr: float | None
    text: str
    style: str


@dataclass(frozen=True)
class Cell:
    """One cell of a grid.

    Attributes:
        shade: 0 (background) to 1 (full colour).
        text: short text inside it, hidden where cells are narrow.
        title: what a pointer on it shows.
    """

    shade: float
    text: str
    title: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from `low` to `high` or a little beyond, about `count` of them."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    raw = (high - low) / max(1, count - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def dot_plot(dots: list[Dot], label: str, *, unit: str = "") -> str:
    """Draw values with their standard errors on one axis that starts at zero.

    Args:
        dots: rows, top to bottom.
        label: what the chart shows, for screen readers.
        unit: text after each tick's number.
    """
    top = max((dot.value + (dot.stderr or 0) for dot in dots), default=1.0)
    marks = ticks(0, top or 1.0)
    scale = 100 / marks[-1]
    lines = "".join(
        f'<line class="gridline" x1="{m * scale:.2f}%" x2="{m * scale:.2f}%" y1="0" y2="100%"/>' for m in marks
    )
    rows = []
    for dot in dots:
        x, half = dot.value * scale, (dot.stderr or 0) * scale
        whisker = f'<line class="whisker" x1="{max(0, x - half):.2f}%" x2="{x + half:.2f}%" y1="50%" y2="50%"/>'
        rows.append(
            f'<div class="dot-row {dot.style}"><span class="dot-label">{escape(dot.label)}</span>'
            f'<svg aria-hidden="true" focusable="false"><title>{escape(f"{dot.label}: {dot.text}")}</title>{lines}'
            f'<line class="stem" x1="0" x2="{max(0, x - half):.2f}%" y1="50%" y2="50%"/>{whisker if half else ""}'
            f'<circle cx="{x:.2f}%" cy="50%" r="5.5"/></svg><span class="dot-value">{escape(dot.text)}</span></div>'
        )
    axis = "".join(f'<span style="left:{m * scale:.2f}%">{_short(m)}{escape(unit)}</span>' for m in marks)
    summary = f"{label}: " + "; ".join(f"{dot.label} {dot.text}" for dot in dots)
    return (
        f'<div class="dots" role="img" aria-label="{escape(summary)}">{"".join(rows)}'
        '<div class="dot-row axis-row" aria-hidden="true"><span></span>'
        f'<div class="axis-x">{axis}</div><span></span></div></div>'
    )


def line_chart(series: list[tuple[str, str, list[Point]]], label: str, x_title: str, y_title: str) -> str:
    """Draw lines over a common x axis.

    Args:
        series: (name, CSS class, points); the class `marks` draws the points too, `marks trial` without a line.
        label: what the chart shows, for screen readers.
        x_title: under the x axis.
        y_title: above the y axis.
    """
    points = [point for _, _, values in series for point in values]
    if not points:
        return ""
    marks_y = ticks(min(y for _, y in points), max(y for _, y in points))
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    whole = all(x == int(x) for x, _ in points)  # such as steps: 2.5 of them would make no sense
    marks_x = [m for m in ticks(x_low, x_high) if x_low <= m <= x_high and (m == int(m) or not whole)] or [x_low]

    def across(x: float) -> float:
        return 50.0 if x_high == x_low else 100 * (x - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        return 100 * (marks_y[-1] - y) / (marks_y[-1] - marks_y[0])

    grid = "".join(
        f'<line class="gridline" x1="0" x2="100%" y1="{down(m):.2f}%" y2="{down(m):.2f}%"/>' for m in marks_y
    )
    drawn, legend = [], []
    for name, style, values in series:
        if not values:
            continue
        drawn.append(_line(style, [(across(x), down(y), f"{name}, {x_title} {x:g}: {y:.4g}") for x, y in values]))
        legend.append(f'<span class="key {style}"><i></i>{escape(name)}</span>')
    labels_y = "".join(f'<span style="top:{down(m):.2f}%">{_short(m)}</span>' for m in marks_y)
    labels_x = "".join(f'<span style="left:{across(m):.2f}%">{_short(m)}</span>' for m in marks_x)
    return (
        f'<div class="legend" aria-hidden="true">{"".join(legend)}</div>'
        f'<div class="lines" role="img" aria-label="{escape(label)}"><div class="axis-title">{escape(y_title)}</div>'
        f'<div class="axis-y" aria-hidden="true">{labels_y}</div>'
        f'<svg class="plot" focusable="false">{grid}{"".join(drawn)}</svg>'
        f'<div class="axis-x" aria-hidden="true">{labels_x}</div>'
        f'<div class="axis-title end">{escape(x_title)}</div></div>'
    )


def _line(style: str, points: list[tuple[float, float, str]]) -> str:
    """Draw one series; points are (x, y) in percent and what a pointer on them shows."""
    path = " ".join(f"{x:.3f},{y:.3f}" for x, y, _ in points)
    drawn = (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" overflow="visible" width="100%" height="100%">'
        f'<polyline class="line {style}" points="{path}"/></svg>'
    )
    if "marks" not in style and len(points) > 1:
        return drawn
    return drawn + "".join(
        f'<circle class="mark {style}" cx="{x:.2f}%" cy="{y:.2f}%" r="4"><title>{escape(text)}</title></circle>'
        for x, y, text in points
    )


def grid_chart(cells: dict[tuple[str, int], Cell], label: str) -> str:
    """Draw a grid with a row per kind of module and a column per layer; what is absent stays empty.

    Args:
        cells: {(row label, layer): cell}; rows keep their order.
        label: what the chart shows, for screen readers.
    """
    names = list(dict.fromkeys(name for name, _ in cells))
    layers = sorted({layer for _, layer in cells})
    width = 100 / len(layers)
    rows = []
    for name in names:
        drawn = [_cell(cells.get((name, layer)), index * width, width) for index, layer in enumerate(layers)]
        rows.append(
            f'<div class="grid-row"><span class="grid-label">{escape(name).replace("+", "<wbr>+")}</span>'
            f'<svg focusable="false" aria-hidden="true">{"".join(drawn)}</svg></div>'
        )
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(layers) / step <= 12)
    axis = "".join(
        f'<span style="left:{(i + 0.5) * width:.2f}%">{layer}</span>'
        for i, layer in enumerate(layers)
        if layer % every == 0
    )
    size = "grid many" if len(layers) > 16 else "grid"
    return (
        f'<div class="{size}" role="img" aria-label="{escape(label)}">{"".join(rows)}'
        f'<div class="grid-row axis-row" aria-hidden="true"><span class="grid-label">layer</span>'
        f'<div class="axis-x">{axis}</div></div></div>'
    )


def _cell(cell: Cell | None, left: float, width: float) -> str:
    place = f'x="{left:.3f}%" width="{width:.3f}%" y="0" height="100%"'
    if cell is None:
        return f'<rect class="cell empty" {place}/>'
    style = "cell-text strong" if cell.shade > 0.55 else "cell-text"
    text = f'<text class="{style}" x="{left + width / 2:.3f}%" y="50%">{escape(cell.text)}</text>' if cell.text else ""
    return (
        f'<g><title>{escape(cell.title)}</title><rect class="cell ground" {place}/>'
        f'<rect class="cell" {place} fill-opacity="{cell.shade:.3f}"/>{text}</g>'
    )


def scale_legend(stops: list[tuple[str, float]]) -> str:
    """Draw what the shades of a grid mean."""
    size = 'width="14" height="14"'
    swatches = "".join(
        f'<span class="key"><svg {size} aria-hidden="true"><rect class="cell ground" {size}/>'
        f'<rect class="cell" {size} fill-opacity="{shade:.3f}"/></svg>{escape(text)}</span>'
        for text, shade in stops
    )
    return f'<div class="legend">{swatches}</div>'


def smooth(points: list[Point], window: int) -> list[Point]:
    """Return the centred moving mean of a series, over up to `window` points."""
    half = window // 2
    values = [y for _, y in points]
    means = []
    for index, (x, _) in enumerate(points):
        around = values[max(0, index - half) : index + half + 1]
        means.append((x, sum(around) / len(around)))
    return means


def place(names: list[str]) -> dict[str, tuple[str, int]]:
    """Return {module name: (row, layer)} for a grid.

    The layer is the first number in a name. The row is its last part, or more of it where that alone is ambiguous;
    further numbers (experts) fall together as `*`.
    """
    split: dict[str, tuple[str, int]] = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        rest = name[match.end() :] if match else name
        split[name] = (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", rest), int(match[1]) if match else 0)
    longs = {long for long, _ in split.values()}
    lasts = [long.rpartition(".")[2] for long in longs]
    return {
        name: (_fold(last if lasts.count(last := long.rpartition(".")[2]) == 1 else long), layer)
        for name, (long, layer) in split.items()
    }


def _fold(name: str) -> str:
    """Shorten the name of a group: 'q_proj+k_proj+v_proj' to 'q+k+v_proj'."""
    parts = name.split("+")
    ends = {part.rpartition("_")[2] for part in parts}
    if len(parts) == 1 or len(ends) > 1 or not all("_" in part for part in parts):
        return name
    return "+".join(part.rpartition("_")[0] for part in parts) + f"_{ends.pop()}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
