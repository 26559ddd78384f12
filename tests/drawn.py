"""Reads pages and charts back: what a browser would fetch, what a reader would read, where each mark stands."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch and a reader would read."""

    VOID = frozenset(("meta", "link", "br", "hr", "img", "wbr"))

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.words, self.ids, self.unnamed = [], [], [], [], []
        self.shapes, self.used = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.fetched += [values[name] for name in ("src", "href", "srcset", "action", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if values.get("role") == "img" and not values.get("aria-label"):
            self.unnamed.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        values = dict(attrs)
        self.shapes += [values["id"]] if "id" in values else []
        self.used += [values["href"]] if "href" in values else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


class Drawn:
    """A chart as its numbers: texts and marks with their places, cells with their opacity, lines with their points."""

    def __init__(self, svg):
        self.texts, self.marks, self.cells, self.lines = {}, {}, {}, []
        root = ElementTree.fromstring(svg)
        self.label, self.size = root.get("aria-label"), [float(number) for number in root.get("viewBox").split()[2:]]
        for text in root.iter("text"):
            self.texts[text.text] = float(text.get("x")), float(text.get("y"))
            assert "font-family" not in text.get("style")
        for group in root.iter("g"):
            title, use, path = group.find("title"), group.find("g/use"), group.find("path")
            if title is not None and use is not None:
                self.marks[title.text] = float(use.get("x")), float(use.get("y"))
            elif title is not None:
                self.cells[title.text] = float(re.search(r"opacity: ([\d.]+)", path.get("style") + "opacity: 1")[1])
            elif path is not None and "fill: none; stroke" in path.get("style"):
                points = [tuple(map(float, p.split())) for p in re.findall(r"[ML] ([\d.]+ [\d.]+)", path.get("d"))]
                self.lines.append((path.get("style"), points))

    def line(self, colour, *, width):
        """The line of a colour and a width; that of the legend comes after it."""
        style = re.compile(f"stroke: var\\(--{colour}\\)(; stroke-opacity: [\\d.]+)?; stroke-width: {width}")
        return next(points for found, points in self.lines if style.search(found))

    def x_of(self, value, unit=""):
        """Where a value stands by the ticks 0 and 20, or those that `unit` is a pair of."""
        low, high = unit if isinstance(unit, tuple) else (f"0{unit}", f"20{unit}")
        (left, _), (right, _) = self.texts[low], self.texts[high]
        first, second = (float(re.match(r"[\d.]+", text)[0]) for text in (low, high))
        return left + (right - left) * (value - first) / (second - first)
