"""Generates the reference of commands and recipe keys, and the list of rooms, from the code when the site is built.

A page asks for it with a line such as `<!-- generated: cli -->`. Roles such as :func:`name` in
docstrings become plain code.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any

import structure

_ROLE = re.compile(r":(?:func|class|mod|meth|attr):<code>~?([^<]+)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated sections where a page asks for them."""
    for name, generate in (("cli", _commands), ("recipe", _recipe), ("rooms", _rooms)):
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(generate()))
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Show Sphinx roles in docstrings as code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def _rooms() -> Iterator[str]:
    yield structure.table()


# --- commands -------------------------------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    from sqft.cli.parser import parser

    root = parser()
    subcommands = next(a for a in root._actions if isinstance(a, argparse._SubParsersAction))
    commands: dict[str, argparse.ArgumentParser] = subcommands.choices
    shared = set.intersection(*({_flag(a) for a in sub._actions} for sub in commands.values()))
    yield "## Options of every command\n"
    yield from _options([a for a in next(iter(commands.values()))._actions if _flag(a) in shared])
    for name, sub in commands.items():
        positionals = " ".join((a.metavar or a.dest).upper() for a in sub._actions if not a.option_strings)
        yield f"\n## sqft {name}\n"
        yield f"{sub.description}\n"
        yield f"```\nsqft {name} {positionals} [options]\n```\n"
        yield f"{sub.epilog.replace('Example: ', 'Example: `')}`\n"
        own: list[argparse.Action] = []
        for group in sub._action_groups:
            actions = [a for a in group._group_actions if _flag(a) not in shared]
            if (group.title or "").startswith("settings of"):
                yield from _table_of(own)
                own = []
                yield f"\n**{group.title[0].upper()}{group.title[1:]}**\n"
                yield from _options(actions)
            else:
                own += actions
        yield from _table_of(own)


def _flag(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def _table_of(actions: list[argparse.Action]) -> Iterator[str]:
    if actions:
        yield from _options(actions)


def _options(actions: list[argparse.Action]) -> Iterator[str]:
    yield "\n| option | meaning |\n|---|---|"
    for action in actions:
        flags = [f for f in action.option_strings if not f.startswith("--no-")]
        if not flags:
            shown = f"`{(action.metavar or action.dest).upper()}`"
        else:
            off = [f for f in action.option_strings if f.startswith("--no-")]
            shown = ", ".join(f"`{f}{_value(action)}`" for f in flags) + "".join(f", `{f}`" for f in off)
        text = (action.help or "").replace("%%", "%")
        if action.choices:
            text += f"{'; ' if text else ''}one of {', '.join(f'`{c}`' for c in action.choices)}"
        required = " **Required.**" if action.required and flags else ""
        yield f"| {shown} | {_cell(text)}{required} |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ""
    name = action.metavar or action.dest.rpartition(":")[2].rpartition(".")[2].upper()
    return f" {name}{' ...' if action.nargs == '+' else ''}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("*", "\\*").replace("<", "&lt;")


# --- recipe ---------------------------------------------------------------------------------------------------------


def _recipe() -> Iterator[str]:
    from sqft.recipe import Recipe

    schema = Recipe.model_json_schema()
    models = schema["$defs"]
    order: dict[str, str] = {}
    _walk(schema, models, "", order)
    yield from _model("The whole recipe", schema, order)
    for name, path in order.items():
        yield from _model(f"`{path}`", models[name], order)


def _walk(model: dict[str, Any], models: dict[str, Any], path: str, order: dict[str, str]) -> None:
    """Note each model under the first key that holds it."""
    for key, value in model.get("properties", {}).items():
        for name in re.findall(r"#/\$defs/(\w+)", json.dumps(value)):
            if name not in order:
                order[name] = f"{path}{key}"
                _walk(models[name], models, f"{path}{key}.", order)


def _model(title: str, model: dict[str, Any], order: dict[str, str]) -> Iterator[str]:
    anchor = "whole" if "$defs" in model else f"key-{title.strip('`').replace('.', '-')}"
    yield f"\n## {title} {{: #{anchor} }}\n"
    if model.get("description"):
        yield f"{_cell(model['description'].splitlines()[0])}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key, value in model["properties"].items():
        required = key in model.get("required", [])
        yield (
            f"| `{key}` | {_type(value, order)} | {'**required**' if required else _default(value)} | "
            f"{_cell(value.get('description', ''))} |"
        )


def _type(value: dict[str, Any], order: dict[str, str]) -> str:
    if "$ref" in value:
        path = order[value["$ref"].rpartition("/")[2]]
        return f"[settings](#key-{path.replace('.', '-')})"
    if "anyOf" in value:
        return " or ".join(_type(part, order) for part in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{item}`" for item in value["enum"])
    kind = value.get("type", "any value")
    if kind == "array":
        return f"list of {_type(value['items'], order)}"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}
    bounds = [
        f"{sign} {value[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "&lt;"))
        if key in value
    ]
    return " ".join([names.get(kind, kind), ", ".join(bounds)]).strip()


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return ""
    default = value["default"]
    if isinstance(default, dict) and default:
        return "its own defaults"
    return f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default}`" if default else "empty"
