"""What the commands have in common."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sqft import processes
from sqft.recipe import Recipe, load_recipe


def recipe_of(options: argparse.Namespace) -> Recipe:
    recipe = load_recipe(options.recipe, options.set)
    return recipe if options.threads is None else recipe.model_copy(update={"threads": options.threads})


def announce(stage: str) -> None:
    if processes.first():
        print(f"▸ {stage}", file=sys.stderr, flush=True)


def drawn(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of commands that draw."""
    names = ("seed", "trust_remote_code", "device")
    return {name: getattr(options, name) for name in names}


def fetched(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of commands that draw and may fetch a model."""
    return {**drawn(options), "model_revision": options.model_revision}
