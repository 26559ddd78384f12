"""Charts as static inline SVG, drawn by matplotlib: no script, no request, the same bytes for the same numbers.

What matplotlib writes is made an element of the page: colours become variables of style.css, so that light and dark
both fit, text stays text in the page's own font, and marks have titles for a pointer. Figures are drawn narrow, for
phones. Each has a label for screen readers; its numbers stand in a table beside it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Point = tuple[float, float]

SERIES = 6
_LINK = "{http://www.w3.org/1999/xlink}href"
_TITLE = "title: "  # begins the gid of a mark that has a title
# Variables of style.css; the first three are those of charts.mplstyle, the last ones those of the series.
_NAMES: tuple[str, ...] = ("ink", "muted", "grid", "card", "plain", "on-accent", "accent-soft")
_NAMES += ("accent", "earlier", "held-out", "bad", "violet", "muted")
# matplotlib knows numbers alone, so each stands for its variable.
_COLOURS = [f"#5af7{i:02x}" for i in range(len(_NAMES))]
_INK, _MUTED, _, _CARD, _PLAIN, _ON_ACCENT, _SOFT, *_OF_SERIES = _COLOURS
_ACCENT, _EARLIER, _HELD_OUT = _OF_SERIES[:3]
_DOTS = {
    "tuned": _ACCENT,
    "merged": _ACCENT,
    "sparse": _SOFT,
    "quantized": _SOFT,
    "baseline": _EARLIER,
    "teacher": _EARLIER,
}
_MARK: dict[str, Any] = {"marker": "o", "ls": ""}
_LINES: dict[str, dict[str, Any]] = {
    "main": {"color": _ACCENT, "lw": 1.6},
    "raw": {"color": _ACCENT, "lw": 0.7, "alpha": 0.4},
    "held-out": {"color": _HELD_OUT, "lw": 1.2, "ls": ":", "marker": "o"},
    "trial": {**_MARK, "mec": _PLAIN, "mfc": _CARD, "ms": 5},
    "front": {"color": _ACCENT, "lw": 1.2, "marker": "o"},
    "heuristic": {**_MARK, "mec": _EARLIER, "mfc": "none", "ms": 10, "mew": 1.6},
    "chosen": {**_MARK, "color": _HELD_OUT, "marker": "D"},
    "hollow": {**_MARK, "mec": _MUTED, "mfc": _CARD},
}
for _number, (_colour, _shape) in enumerate(zip(_OF_SERIES, "osD^vP", strict=True)):
    _LINES[f"series-{_number}"] = {"color": _colour, "marker": _shape}
    _LINES[f"hollow-{_number}"] = {"ls": "", "marker": _shape, "mec": _colour, "mfc": _CARD, "mew": 1.4}


class Dot(NamedTuple):
    """A row of a dot plot: `stderr` is half its whisker, `text` what a reader sees; `style` is in `_DOTS` or grey."""

    label: str
    value: float
    stderr: float | None
    text: str
    style: str


class GridCell(NamedTuple):
    """A cell of a grid: 0 (background) to 1 (full colour), text where there is room, and what a pointer on it shows."""

    shade: float
    text: str
    title: str


def dot_plot(dots: list[Dot], label: str, *, unit: str = "", lowest: float = 0.0) -> str:
    """Draw values with their standard errors on one axis that holds zero.

    Args:
        dots: rows, top to bottom.
        label: what the chart shows, for screen readers.
        unit: text after each tick's number.
        lowest: where whiskers are cut off; no share is below zero.
    """

    def paint(ax: Axes) -> None:
        _number_axis(ax.xaxis, unit=unit)
        for row, dot in enumerate(dots):
            colour, half, bold = _DOTS.get(dot.style, _PLAIN), dot.stderr or 0, dot.style == "merged"
            ax.plot([0, dot.value], [row, row], color=colour, lw=1.5, alpha=0.35)
            ax.plot([max(lowest, dot.value - half), dot.value + half], [row, row], color=colour, lw=5, alpha=0.4)
            ax.plot([dot.value], [row], "o", mfc=colour, ms=8, gid=f"{_TITLE}{dot.label}: {dot.text}")
            name = dot.label if len(dot.label) <= 42 else f"{dot.label[:41]}…"
            for x, side, text in ((0, "left", name), (1, "right", dot.text)):
                placed = ax.text(x, row - 0.45, text, ha=side, va="center", transform=ax.get_yaxis_transform())
                placed.set_fontweight("bold" if bold else "normal")
        if not any(dot.value or dot.stderr for dot in dots):
            ax.set_xlim(0, 1)
        ax.set_ylim(len(dots) - 0.5, -0.8)
        ax.set_yticks([])

    return _draw(paint, 32 * len(dots) + 24, f"{label}: " + "; ".join(f"{dot.label} {dot.text}" for dot in dots))


def line_chart(series: list[tuple[str, str, list[Point]]], label: str, x_title: str, y_title: str) -> str:
    """Draw lines over a common x axis.

    Args:
        series: (name, style, points); the legend leaves out names that begin with an underscore. A style is a key of
            `_LINES`, among them `series-N` and `hollow-N` for N below `SERIES`.
        label: what the chart shows, for screen readers.
        x_title: under the x axis.
        y_title: above the y axis.
    """
    across = [x for _, _, values in series for x, _ in values]
    if not across:
        return ""

    def paint(ax: Axes) -> None:
        # Of whole numbers such as steps 2.5 would make no sense.
        _number_axis(ax.xaxis, integer=all(x == int(x) for x in across))
        _number_axis(ax.yaxis)
        for name, style, values in series:
            look = _LINES[style]
            if look.get("ls") != "":
                ax.plot([x for x, _ in values], [y for _, y in values], **look | {"marker": ""})
            for x, y in values if "marker" in look or len(values) == 1 else []:
                title = f"{_TITLE}{name.lstrip('_')}, {x_title} {x:g}: {y:.4g}"
                ax.plot([x], [y], **_MARK | look | {"gid": title})
        beside = 0.03 * (max(across) - min(across)) or 0.5
        ax.set_xlim(min(across) - beside, max(across) + beside)
        ax.grid(axis="x", visible=False)
        ax.set_title(y_title)
        ax.set_xlabel(x_title, loc="right")
        keys = {name: _LINES[style] for name, style, _ in series if not name.startswith("_")}
        _legend(ax, {name: ax.plot([], [], **look)[0] for name, look in keys.items()})

    return _draw(paint, 205, label)


def grid_chart(cells: dict[tuple[str, int], GridCell], label: str, stops: list[tuple[str, float]]) -> str:
    """Draw a grid with a row per kind of module and a column per layer; what is absent stays empty.

    Args:
        cells: {(row label, layer): cell}; rows keep their order.
        label: what the chart shows, for screen readers.
        stops: (text, shade) of the legend.
    """
    names = list(dict.fromkeys(name for name, _ in cells))
    first, last = min(layer for _, layer in cells), max(layer for _, layer in cells)

    def paint(ax: Axes) -> None:
        from matplotlib.patches import Rectangle

        def patch(x: int, y: int, shade: float, **more: Any) -> Rectangle:
            return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, color=_ACCENT, lw=0, alpha=0.1 + 0.9 * shade, **more)

        for (name, layer), cell in cells.items():
            row = names.index(name)
            ax.add_patch(patch(layer, row, cell.shade, gid=_TITLE + cell.title))
            if last - first < 12:
                colour = _ON_ACCENT if cell.shade > 0.55 else _INK
                ax.text(layer, row, cell.text, color=colour, ha="center", va="center")
        ax.set_xlim(first - 0.5, last + 0.5)
        ax.set_ylim(len(names) - 0.5, -0.5)
        _number_axis(ax.xaxis, integer=True)
        ax.set_yticks(range(len(names)), [name if len(name) <= 18 else f"…{name[-17:]}" for name in names])
        ax.grid(visible=False)
        ax.set_xlabel("layer", loc="right")
        _legend(ax, {text: patch(0, 0, shade) for text, shade in stops}, handlelength=1, handleheight=1)

    return _draw(paint, 22 * len(names) + 34, label)


def _number_axis(axis: Axis, *, integer: bool = False, unit: str = "") -> None:
    """Give an axis about five round ticks."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=integer))
    axis.set_major_formatter(f"{{x:,.10g}}{unit}")


def _legend(ax: Axes, keys: dict[str, Any], **more: Any) -> None:
    """Put a legend above a chart, which grows by its height."""
    columns = max(1, min(len(keys), 56 // (max(map(len, keys)) + 5)))
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.legend(keys.values(), keys.keys(), loc="outside upper left", ncols=columns, **more)
    figure.set_figheight(figure.get_figheight() + 15 / 72 * -(-len(keys) // columns))


def _draw(paint: Callable[[Axes], None], height: float, label: str) -> str:
    """Return what `paint` draws as an element of the page, 340 wide where text has the size 10."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    file = io.StringIO()
    style = files("sqft.pages") / "charts.mplstyle"  # leaves nothing of a user's own settings
    with as_file(style) as path, mpl.rc_context({"svg.hashsalt": label}, fname=path):  # ids differ from chart to chart
        figure = Figure(figsize=(340 / 72, height / 72))
        paint(figure.add_subplot())
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _element(file.getvalue(), label)


def _element(svg: str, label: str) -> str:
    """Return the file that matplotlib wrote as an element of a page, without what is for a file of its own."""
    root = ElementTree.fromstring(svg)  # noqa: S314 (matplotlib's own)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]  # HTML knows the namespaces
        # A style there is for the whole page, and clipping would halve the marks on an edge.
        for child in [c for c in element if c.tag.rpartition("}")[2] in ("style", "clipPath", "metadata")]:
            element.remove(child)
        name, target = element.attrib.pop("id", ""), element.attrib.pop(_LINK, "")
        fonts = [part for part in element.get("style", "").split("; ") if not part.startswith("font-family")]
        changed = {"style": "; ".join(fonts), "href": target, "id": name if element.tag == "path" else ""}
        element.attrib.update({key: value for key, value in changed.items() if value})
        element.attrib.pop("clip-path", None)
        if name.startswith(_TITLE):
            title = ElementTree.Element("title")
            title.text = name.removeprefix(_TITLE)
            element.insert(0, title)
    root.attrib = {
        "class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "focusable": "false",
    }  # fmt: skip
    text = " ".join(ElementTree.tostring(root, encoding="unicode").split()).replace("> <", "><")
    for colour, name in zip(_COLOURS, _NAMES, strict=True):
        text = text.replace(colour, f"var(--{name})")
    return text
