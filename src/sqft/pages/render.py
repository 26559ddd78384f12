"""The forms of a page. What each looks like is said in templates/ alone: page.html.j2, page.md.j2 and card.md.j2."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

    from sqft.pages.blocks import Page


def write(page: Page, path: Path) -> Path:
    """Write a page as `path`.md and as `path`.html, one document that loads nothing; return the latter's path."""
    text, html = path.with_suffix(".md"), path.with_suffix(".html")
    write_text(text, form("page.md.j2", page=page))
    write_text(html, form("page.html.j2", page=page, version=_version(), text_form=text.name))
    return html


def _version() -> str:
    try:
        return version("sqft")
    except PackageNotFoundError:  # run from its sources
        return "(its sources)"


def form(template: str, **values: object) -> str:
    """Return what a template makes of its values, most of all of a page."""
    return _templates().get_template(template).render(values).rstrip() + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is whole or unchanged."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("sqft.pages"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
