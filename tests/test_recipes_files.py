"""Every recipe that is shipped loads, and the files it names are here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sqft.data.load import load_examples
from sqft.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "recipes").glob("**/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.note, "a reader of the report should know what this recipe is for"
    for baseline in recipe.evaluate.baselines if recipe.evaluate else []:
        assert not Path(baseline).is_absolute(), "a shipped recipe names files of this repository"
        assert (path.parent.parent / baseline).is_file() or (path.parent / baseline).is_file(), baseline


def test_there_are_recipes():
    assert RECIPES


def test_the_tutorials_rows_pass_the_checks(monkeypatch):
    """What `sqft run recipes/my-data.yaml` reads before any work, from the repository's root as the tutorial says."""
    monkeypatch.chdir(REPOSITORY)
    data = load_recipe(REPOSITORY / "recipes" / "my-data.yaml").data
    parts = {split: load_examples(data, split, 0) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 150, "validation": 30, "test": 60}
    asked = [{example.prompt for example in rows} for rows in parts.values()]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 240
    for rows in parts.values():
        answers = {example.answer for example in rows}
        assert answers == {" account", " billing", " delivery", " repair", " returns"}
    assert Path(data.task).stat().st_size < 60_000


def test_the_tutorial_shows_the_recipe_that_is_shipped(tmp_path):
    text = (REPOSITORY / "docs" / "tutorial.md").read_text()
    (shown,) = re.findall(r"```yaml\n(name: my-data\n.*?)```", text, re.DOTALL)
    file = tmp_path / "my-data.yaml"
    file.write_text(shown)
    shipped = load_recipe(REPOSITORY / "recipes" / "my-data.yaml")
    assert load_recipe(file) == shipped.model_copy(update={"note": ""})
