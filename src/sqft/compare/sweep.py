"""Accuracy over sparsity levels (the paper's Figure 5), LoRA against NLS at each (Tables 5 and 9), none (Table 10).

A level is an ordinary comparison in `OUT/sparsity-S`. Level 0 prunes nothing: methods on a sparse float base are left
out, those on a quantised base start from the dense model. A pattern such as 2:4 is also a level.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.compare.methods import METHODS, check_methods, with_level
from sqft.compare.run import run as run_comparison
from sqft.compare.table import score_text
from sqft.disk import read_json, write_json
from sqft.errors import Problems
from sqft.pages.blocks import Block, Columns, Figure, Page, Row, Section, Table
from sqft.pages.charts import SERIES, Point, line_chart
from sqft.pages.render import write
from sqft.pages.text import model_name

if TYPE_CHECKING:
    from sqft.recipe import Recipe

logger = logging.getLogger(__name__)

DEFAULT = (
    *("sparse", "lora", "shears", "sparsepeft_lora", "sparsepeft"),
    *("int4", "gptq_lora", "sqft", "qa_lora", "qa_sparsepeft"),
)
# The names of methods on a sparse float base if nothing is pruned.
_UNPRUNED = {"sparse": "dense", "lora": "dense_lora"}


def run(
    recipe: Recipe,
    out: Path,
    levels: Sequence[str],
    methods: Sequence[str] = DEFAULT,
    seeds: int = 1,
    announce: Callable[[str], None] = logger.info,
    command: str = "",
) -> Path:
    """Run a comparison at every level and return the path of sweep.html.

    Args:
        recipe: model, data, and the settings shared by all.
        out: the folder of the sweep.
        levels: sparsities such as '0.3', '0' for none, and patterns such as '2:4'.
        methods: keys of METHODS.
        seeds: training seeds.
        announce: called with each level and row as it starts.
        command: the user's command line, recorded in each row.

    Raises:
        InputError: an invalid level, or as for a comparison; before any work.
    """
    with Problems("sweep") as problems:
        check_methods(methods, problems)
        if recipe.teacher is not None:
            problems.add(
                "the recipe has a teacher, which would be made again at every level; leave it out, or give the model "
                "that it makes as `model`"
            )
    recipes = {level: with_level(recipe, level) for level in levels}
    for level, made in recipes.items():
        announce(f"sparsity {level}")
        run_comparison(made, out / f"sparsity-{_folder(level)}", methods_at(made, methods), seeds, announce, command)
        write_sweep(recipe, out, list(recipes), methods)
    return write_sweep(recipe, out, list(recipes), methods)


def methods_at(recipe: Recipe, methods: Sequence[str]) -> list[str]:
    """Return the methods of a level, under their names at that level."""
    if recipe.sparsify is not None:
        return list(methods)
    named = [_UNPRUNED.get(name, name) for name in methods]
    return [name for name in dict.fromkeys(named) if METHODS[name].base != "sparse"]


def write_sweep(recipe: Recipe, out: Path, levels: Sequence[str], methods: Sequence[str]) -> Path:
    """Write sweep.json, sweep.md and sweep.html from the finished levels; return the path of sweep.html."""
    summary: dict[str, Any] = {"model": recipe.model, "data": recipe.data.task, "levels": list(levels), "methods": {}}
    found = {level: out / f"sparsity-{_folder(level)}" / "compare.json" for level in levels}
    tables = {level: read_json(file)["methods"] for level, file in found.items() if file.is_file()}
    for name in methods:
        values = {}
        for level, rows in tables.items():
            called = name if ":" in level or float(level) else _UNPRUNED.get(name, name)
            row: dict[str, Any] = next((row for row in rows if row["method"] == called), {})
            shares = [task for task in row.get("tasks", {}).values() if task["metric"] != "perplexity"]
            if shares:
                values[level] = row["all"] or shares[0]
        summary["methods"][name] = values
    write_json(out / "sweep.json", summary)
    return write(page(summary), out / "sweep")


def _folder(level: str) -> str:
    return level.replace(":", "of")


def _level_text(level: str) -> str:
    return level if ":" in level else f"{100 * float(level):g} %"


def chart(summary: Mapping[str, Any]) -> str:
    """Draw accuracy over sparsity: a line for each method, hollow marks for its patterns such as 2:4."""
    series: list[tuple[str, str, list[Point]]] = []
    patterns = [level for level in summary["levels"] if ":" in level]
    for number, (name, values) in enumerate(summary["methods"].items()):
        found = {v: (100 * _zeros(v), 100 * values[v]["value"]) for v in summary["levels"] if v in values}
        label, style = METHODS[name].label, number % SERIES
        if line := sorted(point for level, point in found.items() if level not in patterns):
            series.append((label, f"series-{style}", line))
        key = "" if line else label  # a method with patterns alone is still in the legend
        marks = [(level, found[level]) for level in patterns if level in found]
        series += [(key or f"_{label} at {level}", f"hollow-{style}", [point]) for level, point in marks]
    if any(style.startswith("hollow") for _, style, _ in series):
        series.append((f"hollow: {', '.join(patterns)}", "hollow", []))
    said = [f"{name.lstrip('_')} {'; '.join(f'{x:g} %: {y:.1f}' for x, y in points)}" for name, _, points in series]
    return line_chart(series, f"Accuracy over sparsity. {'. '.join(said)}", "sparsity (%)", "accuracy (%)")


def _zeros(level: str) -> float:
    kept, colon, group = level.partition(":")
    return 1 - int(kept) / int(group) if colon else float(level)


def page(summary: Mapping[str, Any]) -> Page:
    """Return the page of a sweep."""
    levels = summary["levels"]
    rows = [
        Row([METHODS[name].label, *(score_text(values.get(level)) for level in levels)])
        for name, values in summary["methods"].items()
    ]
    shown = Table(
        ["Method", *map(_level_text, levels)],
        rows,
        "Per cent ± standard error over test rows, then over training seeds.",
    )
    drawn = chart(summary)
    blocks: list[Block] = [Columns([[Figure(drawn)] if drawn else []]), shown]
    title = f"{model_name(summary['model'])} on {summary['data']} over sparsity"
    return Page(title, [Section("sweep", "Accuracy over sparsity", blocks)])
