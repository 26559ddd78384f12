"""Every recipe that is shipped loads, and the files it names are here."""

from __future__ import annotations

from pathlib import Path

import pytest

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
