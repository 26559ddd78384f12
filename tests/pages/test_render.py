"""Every block has a form on every page; what people wrote is escaped; both forms say the same."""

from __future__ import annotations

from typing import NamedTuple, get_args

import pytest
from jinja2 import UndefinedError

from drawn import Page as Reader
from sqft.pages import blocks
from sqft.pages.blocks import Badge, Cell, Code, Columns, Figure, Folded, Items, Page, Row, Section, Table, Text, Tiles
from sqft.pages.render import form, write

CHART = '<svg class="chart" role="img" aria-label="x"></svg>'
TABLE = Table(
    heads=["a", "b"],
    rows=[
        Row(["one", Cell("2", "± 1", "n = 3", bar=0.5)], "small `print`"),
        Row([Cell("x", tag="new"), Badge("passed", "passed")]),
    ],
    caption="cap",
    notes="notes",
)
EACH = [
    (Text("words `code`", "lead"), "words"),
    (Badge("failed", "no"), "no"),
    (Items(["entry"], "title"), "entry"),
    (Tiles([("label", "value", "extra", "source")]), "value"),
    (Code("x = 1", "python"), "x = 1"),
    (Figure(CHART, "figure"), "figure"),
    (TABLE, "one"),
    (Folded("more", [Text("inner")]), "inner"),
    (Columns([[Text("left")], [], [Folded("open", [Text("right")])]]), "right"),
]


def one(block, template):
    return form(template, page=Page("T", [Section("key", "S", [block])]), version="1", text_form="page.md")


@pytest.mark.parametrize("template", ["page.html.j2", "page.md.j2"])
@pytest.mark.parametrize(("block", "shown"), EACH)
def test_every_block_has_a_form(block, shown, template):
    is_text = template == "page.md.j2"
    assert (shown in one(block, template)) is not (isinstance(block, Figure) and is_text)


def test_every_kind_of_block_is_tried():
    assert {type(block) for block, _ in EACH} == set(get_args(blocks.Block))


@pytest.mark.parametrize("template", ["page.html.j2", "page.md.j2"])
def test_a_block_without_a_form_is_an_error(template):
    class Other(NamedTuple):
        text: str

    with pytest.raises(UndefinedError, match="no_form_of"):
        one(Other("x"), template)


def test_a_table_in_both_forms():
    lines = one(TABLE, "page.md.j2").splitlines()
    assert lines[4:10] == [
        "| a | b | notes |",
        "| --- | --- | --- |",
        "| one | 2 ± 1 (n = 3) | small `print` |",
        "| x (new) | passed |  |",
        "",
        "cap",
    ]
    without = one(TABLE._replace(notes=""), "page.md.j2").splitlines()
    assert without[4:7] == ["| a | b |", "| --- | --- |", "| one | 2 ± 1 (n = 3) |"]
    html = one(TABLE, "page.html.j2")
    assert '<b>2</b> <span class="error">± 1</span>' in html
    assert "small <code>print</code>" in html
    assert "width:50.0%" in html
    Reader(html)


def test_what_people_wrote_is_escaped():
    html = one(Text("<b>&`<i>` 5 % ` alone"), "page.html.j2")
    assert "&lt;b&gt;&amp;<code>&lt;i&gt;</code> 5\u00a0% ` alone" in html
    assert "<i>" not in html
    cell = one(Table(["a|b"], [Row(["two\nlines | of"])]), "page.md.j2")
    assert "| a\\|b |" in cell
    assert "| two lines \\| of |" in cell


def test_a_page_is_written_in_two_forms(tmp_path):
    page = Page("Title <x>", [Section("a", "A", [Text("said")]), Section("b", "B", [])], [Text("head")], "name")
    assert write(page, tmp_path / "page") == tmp_path / "page.html"
    html, text = (tmp_path / "page.html").read_text(), (tmp_path / "page.md").read_text()
    assert text == "# Title <x>\n\nhead\n\n## A\n\nsaid\n"
    reader = Reader(html)
    assert reader.ids == ["a"], "a section without blocks is left out"
    assert reader.fetched == ["data:,"]
    assert "Title &lt;x&gt;" in html
    assert "page.md says the same as text." in reader.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.md"]
