"""Damaged inputs for the fuzz tests, and what has to come of them: a result, or one error of ours.

An input is a valid one with some of its parts changed, because one of random bytes is refused at its first. How many
are tried is a number and not a time: a few hundred in the plain tests, always the same ones; others with each run, and
as many as the environment's EXAMPLES says over all targets, in `make fuzz`.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sqft.errors import SqftError

ALL_EXAMPLES = 1500
"""Of the plain tests."""
T = TypeVar("T")


def share(part: float) -> settings:
    """Return the settings of a test that has this part of all examples."""
    wanted = os.environ.get("EXAMPLES")
    return settings(
        max_examples=max(1, round(part * int(wanted or ALL_EXAMPLES))),
        derandomize=wanted is None,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# ---- what has to come of it ----


def outcome(work: Callable[[], T], names: str | Path, *, leaves: Path | None = None) -> T | None:
    """Return what the work returns, or None where it is refused as it must be.

    Args:
        work: may raise a SqftError and nothing else.
        names: what the message of one names.
        leaves: a folder in which the work may make nothing.
    """
    before = _listing(leaves)
    try:
        return work()
    except SqftError as error:
        assert str(names) in str(error), f"{error} does not name {names}"
        return None
    finally:
        assert _listing(leaves) == before, "something was left behind"


def _listing(folder: Path | None) -> list[Path]:
    return sorted(folder.rglob("*")) if folder else []


@contextmanager
def copied(source: Path | None = None) -> Iterator[Path]:
    """Make a folder that has the files of another one, as links."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        for file in source.rglob("*") if source else ():
            if file.is_file():
                place = made / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file)
        yield made


def put(folder: Path, name: str, content: bytes) -> Path:
    """Write a file in the place of the one that is there."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return file


# ---- values ----

TEXTS = st.one_of(
    st.sampled_from(["", " ", "\x00", "..", "/", "~", "*", "nan", "1e999", "{", "}", "{}", "{a}", "ﬃ", "é", "🙂", "а"]),
    st.text(max_size=8),
)
HALVES = st.sampled_from(["\ud83d", "a\udc00b"])
"""Half characters, which JSON can write."""
INTEGERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400]))
FLOATS = st.one_of(st.floats(), st.sampled_from([0.5, -0.0, 1e308, 5e-324]))
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)


def values(leaves: st.SearchStrategy[Any] = SCALARS) -> st.SearchStrategy[Any]:
    """Return strategies of anything that JSON holds."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
        max_leaves=5,
    )


@st.composite
def edited(draw: st.DrawFn, value: Any, others: st.SearchStrategy[Any] | None = None, most: int = 3) -> Any:
    """Return a value of which up to `most` parts are dropped, renamed, repeated, wrapped or replaced by `others`."""
    others = values() if others is None else others
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(root))
        holder, key = draw(st.sampled_from(places[1:] or places))
        kind = draw(st.sampled_from(["replace", "replace", "drop", "rename", "wrap", "swap", "add"]))
        if kind == "drop" and holder is not root:
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(TEXTS)] = holder.pop(key)
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"": holder[key]}, str(holder[key])]))
        elif kind == "swap":
            other, place = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other[place])
        elif kind == "add" and isinstance(holder[key], list):
            holder[key].append(copy.deepcopy(draw(others)))
        elif kind == "add" and isinstance(holder[key], dict):
            holder[key][draw(TEXTS)] = copy.deepcopy(draw(others))
        else:
            holder[key] = copy.deepcopy(draw(others))  # what is sampled is one object each time
    return root[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (list or dictionary, key) of all parts of a value."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


# ---- bytes ----


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes with up to three of them or their ranges changed."""
    content = bytes(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([1, 2, 8, 64])))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "drop", "repeat"]))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[end:]
        elif kind == "repeat":
            content = content[:end] + content[at:]
        else:
            new = draw(st.binary(min_size=1, max_size=9))
            content = content[:at] + new + content[at if kind == "insert" else at + len(new) :]
    return content


def nested(text: str, depth: int) -> str:
    """Return the JSON of a value so many objects deep."""
    return '{"a":' * depth + text + "}" * depth


@st.composite
def json_bytes(draw: st.DrawFn, value: st.SearchStrategy[Any], *, whole: bool = False) -> bytes:
    """Return the JSON of a value: now and then in another encoding, with a key that stands twice, or damaged."""
    text = json.dumps(draw(value), ensure_ascii=draw(st.booleans()))
    if whole:
        return text.encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["plain"] * 6 + ["twice", "damaged", "utf-16", "nested", "half"]))
    if kind == "twice" and text.startswith('{"'):
        key = text[1:].partition(":")[0]
        text = f"{{{key}: {json.dumps(draw(SCALARS))}, {text[1:]}"
    elif kind == "utf-16":
        return text.encode("utf-16", "surrogatepass")
    elif kind == "nested":
        text = nested(text, draw(st.sampled_from([300, 900, 3000])))
    elif kind == "half":
        text = text.replace('"', '"' + draw(HALVES), 2)
    content = text.encode("utf-8", "surrogatepass")
    return draw(damaged(content)) if kind == "damaged" else content


@st.composite
def tensor_files(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a safetensors file with a damaged header, a wrong length before it, or damaged anywhere."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = draw(st.sampled_from(["header", "header", "header", "length", "bytes", "data"]))
    if kind == "bytes":
        return draw(damaged(content))
    if kind == "data":
        return content[: 8 + length] + draw(damaged(data))
    if kind == "header":
        header = draw(json_bytes(edited(json.loads(header), _header_values(len(data)))))
        header += b" " * draw(st.sampled_from([0, -len(header) % 8]))
    length = len(header)
    if kind == "length":
        length = draw(st.sampled_from([0, 1, length - 1, length + 1, length + len(data), 2**31, 2**63, 2**64 - 1]))
    return (length % 2**64).to_bytes(8, "little") + header + data


def _header_values(size: int) -> st.SearchStrategy[Any]:
    """Return what may stand in a header in another's place."""
    dtypes = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "U64", "C64", "f32"]
    offsets = st.one_of(st.integers(0, size), st.sampled_from([0, 4, 64, size - 1, size, size + 1]))
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(dtypes),
            "shape": st.lists(st.integers(0, 64), max_size=3),
            "data_offsets": st.tuples(offsets, offsets).map(list),
        }
    )
    return st.one_of(st.sampled_from(dtypes), offsets, entry, values())
