"""Stage `report`: what a run did, on one page for people and one for version control.

Reads the manifests and results in a run's folder and writes `report.html` (one file that asks for no other, readable
in light, dark, on a phone and by a screen reader) and `report.md`. It measures nothing itself: every number shown
names the file or folder it was read from. What the recipe asks for and the folder lacks is listed, not passed over.
A merged model gets its model card, `merged/README.md`. The same inputs give the same bytes; there is no date in it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sqft.stages.report import words
from sqft.stages.report.card import CARD, base_card, merge_card, model_card
from sqft.stages.report.facts import check_baselines, gather
from sqft.stages.report.markdown import markdown
from sqft.stages.report.page import page

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.artifact import Artifact
    from sqft.recipe import Recipe

__all__ = ["check_baselines", "run", "summary_table", "write_card"]


def run(out: Path, recipe: Recipe) -> Path:
    """Write `report.md` and `report.html` into a run's folder, and the model card into its merged model.

    Args:
        out: the run's folder.
        recipe: the recipe it was made from.

    Returns:
        The path of report.html.

    Raises:
        InputError: a file of the folder cannot be read, or a baseline that the recipe names is not there.
    """
    facts = gather(out, recipe)
    _write(out / "report.md", markdown(facts))
    _write(out / "report.html", page(facts))
    if "merged" in facts.manifests and (base := base_card(out / "merged", facts.manifests["merged"])) is not None:
        _write(out / "merged" / CARD, model_card(facts, base))
    return out / "report.html"


def write_card(merged: Artifact) -> None:
    """Write the model card of a folder that was merged outside a run; a person's own README.md is left alone."""
    if (base := base_card(merged.path, merged.manifest)) is not None:
        _write(merged.path / CARD, merge_card(merged.path, merged.manifest, base))


def summary_table(out: Path, recipe: Recipe) -> list[dict[str, str]]:
    """Return the results table as text, a dict a model; every dict has the same keys in the same order.

    Args:
        out: the run's folder.
        recipe: the recipe it was made from.

    Returns:
        Rows with `model`, a column for each task, `zeros`, `precision`, `size` and `artefact`.
    """
    facts = gather(out, recipe)
    return [
        {
            "model": row.label + (" (earlier run)" if row.key == "baseline" else ""),
            **{words.column_title(facts, c): words.score_text(row.scores.get(c)) for c in facts.columns},
            "zeros": words.percent_text(row.zeros),
            "precision": row.precision or words.ABSENT,
            "size": words.bytes_text(row.size_bytes),
            "artefact": row.source if row.key == "baseline" else row.artefact,
        }
        for row in facts.rows
    ]


def _write(path: Path, text: str) -> None:
    """Write a text file so that it is whole or unchanged."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
