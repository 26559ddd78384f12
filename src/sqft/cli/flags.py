"""Settings as command-line flags: made from the recipe's models, read back into them.

A flag exists for every setting that is a value or a list; mappings and lists of lists stand in recipes only.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sqft.recipe import DataConfig

_SKIPPED = {"seed", "rows", "baselines", "template", "options", "rank_groups", "joint"}
"""Settings that only a recipe can hold."""


def add_flags(
    parser: argparse.ArgumentParser,
    config: type[BaseModel],
    prefix: str = "",
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Add a flag for every setting of a config, with its description and default; `defaults` are the command's own."""
    group = (
        parser if prefix else parser.add_argument_group(f"settings of {config.__name__.removesuffix('Config').lower()}")
    )
    for name, field in config.model_fields.items():
        inner = field.annotation
        models = [a for a in typing.get_args(inner) if isinstance(a, type) and issubclass(a, BaseModel)]
        if models:  # a group of settings that may be absent
            inner = models[0]
        if name in _SKIPPED:
            continue
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            add_flags(parser, inner, f"{prefix}{name}.")
            continue
        default = field.default if field.default is not PydanticUndefined else None
        default = defaults.get(name, default)
        required = field.is_required() and config is DataConfig and parser.prog.split()[-1] != "verify"
        text = (field.description or "").replace("%", "%%")
        switch = inner is bool or set(typing.get_args(inner)) == {bool, type(None)}
        if not required and not (switch and default is None):
            text += f"{' ' if text else ''}(default: {'null' if default is None else default})"
        given = defaults.get(name, argparse.SUPPRESS)
        options: dict[str, Any] = {"dest": f"set:{prefix}{name}", "help": text, "default": given}
        flag = f"--{prefix}{name.replace('_', '-')}"
        if switch:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        choices = _choices(inner)
        kinds = [typing.get_origin(kind) for kind in (inner, *typing.get_args(inner))]
        if list in kinds:  # also one that may be absent
            options["nargs"] = "+"
        if choices:
            options["choices"] = choices
        else:
            options["metavar"] = name.upper()
        group.add_argument(flag, required=required, **options)


def _choices(annotation: Any) -> list[str] | None:
    """Return the values of a Literal, looking into unions and lists."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (list, types.UnionType, typing.Union):
        found = [_choices(inner) for inner in typing.get_args(annotation)]
        return next((choices for choices in found if choices), None)
    return None


def given(options: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """Return the settings of a config that were given as flags."""
    values: dict[str, Any] = {}
    for name, value in vars(options).items():
        first, *rest = name.removeprefix("set:").split(".")
        if not name.startswith("set:") or first not in model.model_fields:
            continue
        value = None if value in ("null", ["null"]) else value
        if rest:
            values.setdefault(first, {})[rest[0]] = value
        else:
            values[first] = value
    return values
