"""Stage `report`: what a run did, as HTML for reading and as Markdown for version control.

Reads the manifests and results in a run's folder and writes `report.html` (one file that asks for no other, readable
in light, dark, on a phone and by a screen reader) and `report.md`. It measures nothing itself: every number shown
names the file or folder it was read from. What the recipe asks for and the folder lacks is listed, not passed over.
A merged model gets its model card, `merged/README.md`. The same inputs give the same bytes; there is no date in it.

facts.py and models.py read, words.py and figures.py say and draw, sections.py puts both in order once, and
:mod:`sqft.pages` gives that its forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqft.pages.render import write, write_text
from sqft.pages.text import ABSENT, bytes_text, percent_text
from sqft.stages.report import sections
from sqft.stages.report.card import CARD, base_card, merge_card, model_card
from sqft.stages.report.facts import gather
from sqft.stages.report.models import check_baselines

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.artifact import Artifact
    from sqft.recipe import Recipe
    from sqft.stages.report.models import Score

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
    path = write(sections.report(facts), out / "report")
    if "merged" in facts.manifests and (base := base_card(out / "merged", facts.manifests["merged"])) is not None:
        write_text(out / "merged" / CARD, model_card(facts, base))
    return path


def write_card(merged: Artifact) -> None:
    """Write the model card of a folder that was merged outside a run; a README.md of the user is left alone."""
    if (base := base_card(merged.path, merged.manifest)) is not None:
        write_text(merged.path / CARD, merge_card(merged.path, merged.manifest, base))


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
            "model": model.label + (" (earlier run)" if model.key == "baseline" else ""),
            **{title: _text(model.scores.get(column)) for column, title in facts.columns.items()},
            "zeros": percent_text(model.zeros),
            "precision": model.precision or ABSENT,
            "size": bytes_text(model.size_bytes),
            "artefact": model.source if model.key == "baseline" else model.artefact,
        }
        for model in facts.models
    ]


def _text(score: Score | None) -> str:
    if score is None:
        return ABSENT
    return f"{score.text} ({score.cell.below})" if score.cell.below else score.text
