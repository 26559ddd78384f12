"""A recipe's YAML file, and settings of it that are overridden."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sqft.disk import local_path, refuse_depth
from sqft.errors import InputError
from sqft.recipe.base import parse_config
from sqft.recipe.whole import Recipe


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2: PyYAML's own reads `2:4` as 124 (base 60) and `3e-4` as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ValueError: it is no YAML, or holds a value that is none, such as 2024-13-45.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
        refuse_depth(value)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # as of `!!bool x` and `!!int ''`
        raise ValueError(f"holds a value that is not of the type it says ({error!r})") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return value


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides.

    Args:
        path: the YAML file.
        overrides: as given to `--set`; values are parsed as YAML, so `--set finetune.ranks=[8,4]` works.

    Raises:
        InputError: the file is missing, is not YAML, or has wrong keys or values; every problem is listed.
    """
    path = local_path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except ValueError as error:
        raise InputError(f"recipe {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe {path}: holds {type(values).__name__}, not a mapping of settings")
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: write it as key=value, for example finetune.epochs=1")
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise InputError(f"--set {override}: {parent} is a value, not a group of settings")
            node = child
        try:
            node[last] = read_yaml(text)
        except ValueError as error:
            raise InputError(f"--set {override}: the value is not valid YAML: {error}") from error
    return parse_config(Recipe, values, f"recipe {path}")
