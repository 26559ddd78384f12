"""What all settings have in common: frozen models that refuse unknown keys and name the nearest right one."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sqft.disk import local_path
from sqft.errors import Problems

PositiveInt = Annotated[int, Field(ge=1)]
MAX_SEED = 2**32 - 1  # NumPy's generators take no more


class Config(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _home(path: str) -> str:
    """Return a path with a leading `~` replaced by the home folder."""
    return str(local_path(path)) if path.startswith("~") else path


PathText = Annotated[str, AfterValidator(_home)]


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (keep_n, group_m) of an 'N:M' pattern, None for 'unstructured'.

    Raises:
        ValueError: neither form, or not 0 < N < M.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern is {pattern!r}; use 'unstructured' or 'N:M' with 0 < N < M, such as '2:4'")
    return int(match[1]), int(match[2])


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_config(model: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """Validate `values` as `model`; unknown keys are named with the nearest right one.

    Raises:
        InputError: every problem, each with its dotted key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        with Problems(where) as problems:
            for item in error.errors():
                key = ".".join(str(part) for part in item["loc"])
                if item["type"] == "extra_forbidden":
                    problems.add(f"unknown key {key!r}{_nearest(model, item['loc'])}")
                else:
                    problems.add(f"{key}: {item['msg'].removeprefix('Value error, ')}" if key else item["msg"])
        raise AssertionError("a ValidationError has at least one problem") from error


def _nearest(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return '; did you mean ...' for an unknown key at `location` inside `model`."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field is not None else None
        candidates = [inner, *getattr(inner, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return ""
        model = found[0]
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(known)}"
