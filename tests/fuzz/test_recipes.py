"""Damaged recipes: YAML that is none, keys and values that are wrong, overrides of all kinds."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import REPOSITORY
from fuzz.damage import SCALARS, copied, edited, outcome, put, share, values
from sqft.errors import InputError
from sqft.recipe import Recipe, load_recipe

RECIPES = [yaml.safe_load(file.read_text()) for file in sorted((REPOSITORY / "recipes").glob("*.yaml"))]
DATES = st.one_of(st.dates(), st.datetimes(), st.just(datetime.date(1, 1, 1)))
# What YAML knows besides JSON, or nearly knows.
PIECES = [
    "&a [*a]", "&a {b: *a}", "*a", "&a x", "<<: *a", "<<: 1", "<<: [1]", "{? [a] : b}", "{? {a: b} : c}", "? a",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a]", "!!binary x", "!!binary 'é'", "!!int x", "!!int ''",
    "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!!map x", "!!seq x", "!!str {a: 1}", "!a b",
    "!<tag:x> y", "!!python/object/apply:os.getcwd []", "2024-13-45", "2024-02-30 25:61:61",
    "2024-01-31T00:00:00+99:99", "0001-01-01 00:00:00 +23:59", "1:2:3", "2:4", "0x10", "0o7", "1_000", "=", "~",
    ".inf", "-.inf", ".nan", "1e999", "9" * 5000, "-" + "9" * 5000, "1e" + "9" * 400, "0." + "3" * 5000, "{",
    "}", "[", "]", "'", '"\\ud83d"', '"\\x00"', "|", ">", "%YAML 9.9", "---", "...", "\t", "- ", "a: b: c", "#",
    "@", "`", "\x00", "\x07", "\ufeff", "\ufffe", "🙂", "[" * 1000, "[" * 600 + "]" * 600, "{a: " * 3000,
    "- " * 3000, "? " * 1000, "name: x", "data: {task: boolq}", "seed: 1", "finetune: {ranks: [1]}",
    "sparsify: {}", "quantize: {}",
]  # fmt: skip
KEYS = sorted(
    {"", ".", "a", "data.options.choices.0", "data.task.x", "finetune.ranks.0", *Recipe.model_fields}
    | {
        f"{group}.{name}"
        for recipe in RECIPES
        for group, part in recipe.items()
        if isinstance(part, dict)
        for name in part
    }
)


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """A recipe of ours with other values, and now and then pieces of YAML in the middle of it."""
    anything = values(st.one_of(SCALARS, DATES))
    value = draw(edited(draw(st.sampled_from(RECIPES)), anything, most=2))
    text = yaml.safe_dump(value, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans()))
    for piece in draw(st.lists(st.sampled_from(PIECES), max_size=2)):
        lines = text.splitlines()
        at = draw(st.integers(0, len(lines)))
        kind = draw(st.sampled_from(["line", "value", "middle"]))
        if kind == "line" or at == len(lines):
            lines.insert(at, piece)
        elif kind == "value":
            lines[at] = f"{lines[at].partition(': ')[0]}: {piece}"
        else:
            place = draw(st.integers(0, len(lines[at])))
            lines[at] = lines[at][:place] + piece + lines[at][place:]
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


OVERRIDES = st.tuples(
    st.one_of(st.sampled_from(KEYS), st.text("abc.\x00é=", max_size=5)),
    st.sampled_from(["=", "=", "=", "=", "", "=="]),
    st.one_of(st.sampled_from(PIECES), values().map(lambda value: yaml.safe_dump(value))),
).map("".join)


def read(content: bytes, overrides: list[str]) -> Recipe | None:
    with copied() as place:
        file = put(place, "recipe.yaml", content)
        return outcome(lambda: load_recipe(file, overrides), "", leaves=place)


def as_it_was(recipe: Recipe | None) -> None:
    """What a manifest records of a recipe gives the same recipe again."""
    if recipe is not None:
        dumped = recipe.model_dump(mode="json")
        assert repr(Recipe.model_validate(dumped).model_dump(mode="json")) == repr(dumped)


@share(0.2)
@given(recipes())
def test_a_recipe_is_read_or_refused(content: bytes) -> None:
    as_it_was(read(content, []))


@share(0.1)
@given(st.sampled_from(RECIPES), st.lists(OVERRIDES, min_size=1, max_size=3))
def test_an_override_is_read_or_refused(recipe: dict[str, Any], overrides: list[str]) -> None:
    as_it_was(read(yaml.safe_dump(recipe).encode(), overrides))


@pytest.mark.parametrize(
    "piece",
    [
        "2024-13-45",
        "!!int ''",
        "!!int x",
        "!!bool x",
        "!!timestamp x",
        "9" * 5000,
        "[" * 600 + "]" * 600,
        "&a [*a]",
        "&a {b: *a}",
    ],
)
def test_yaml_that_holds_no_values_is_refused(piece: str, tmp_path: Path) -> None:
    file = put(tmp_path, "recipe.yaml", f"name: x\nmodel: x\ndata: {{task: boolq}}\nnote: {piece}\n".encode())
    with pytest.raises(InputError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(file)
    file = put(tmp_path, "recipe.yaml", b"name: x\nmodel: x\ndata: {task: boolq}\n")
    with pytest.raises(InputError, match="the value is not valid YAML"):
        load_recipe(file, [f"data.options.a={piece}"])


def test_aliases_that_stand_for_too_much_are_refused(tmp_path: Path) -> None:
    lines = ["  a0: &a0 [x]", *(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    text = "name: x\nmodel: x\ndata:\n task: boolq\n options:\n" + "\n".join(lines)
    with pytest.raises(InputError, match="parts"):
        load_recipe(put(tmp_path, "recipe.yaml", text.encode()))
