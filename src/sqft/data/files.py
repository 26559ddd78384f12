r"""Rows from the user's files: JSON lines, a JSON array, CSV, parquet, each plain or compressed.

The format is detected from the content first, then from the name: a parquet file named x.jsonl is read as parquet.
JSON lines begin with a brace, an array with a bracket. CSV is recognised by its name, because any text could be CSV.
Text is UTF-8, or UTF-16 and UTF-32 with a byte order mark. Other formats that the first bytes identify raise an error
that says how to convert them.

Values are not converted. CSV cells are text: 007, 1e5 and 2024-02-29 are unchanged. `datasets` is not used, because
its JSON reader converts such texts to dates, and its CSV reader to numbers. Parquet cannot distinguish a null field
from an absent one; inside a row's lists and structures both count as absent, as in the same rows in JSON.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.errors import InputError

if TYPE_CHECKING:
    from sqft.data.tasks import Row

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
}
_PARQUET = b"PAR1"
# Formats that are not read, by first bytes: (name, remedy).
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": ("zstandard-compressed data", "unpack it (unzstd FILE)"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "save the sheet as CSV in UTF-8"),
    b"ARROW1\x00\x00": ("an Arrow file", "write parquet: datasets.Dataset.from_file(FILE).to_parquet('train.parquet')"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "write parquet: datasets.Dataset.from_file(FILE).to_parquet('t.parquet')"),
    b"SQLite format 3\x00": ("an SQLite data base", "export the table as CSV"),
    b"\x89HDF": ("an HDF5 file", "write its rows as JSON lines"),
    b"Obj\x01": ("an Avro file", "write its rows as parquet"),
    b"\x93NUMPY": ("a NumPy array", "write its rows as JSON lines"),
    b"\x80\x04": ("a Python pickle, which is never opened", "write its rows as JSON lines"),
    b"\x80\x05": ("a Python pickle, which is never opened", "write its rows as JSON lines"),
    b"%PDF": ("a PDF document", "write its rows as JSON lines"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch it (git lfs pull)"),
}
_PACKED = (".gz", ".bz2", ".xz")
_TABLES = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".ndjson", ".json", *_TABLES, ".parquet")
"""Suffixes of files of rows; each may be followed by .gz, .bz2 or .xz."""


def split_name(name: str) -> tuple[str, str]:
    """Split a file's name into stem and suffix of rows: ('train', '.jsonl.gz'), or (name, '')."""
    inner = next((name.removesuffix(packed) for packed in _PACKED if name.lower().endswith(packed)), name)
    ending = next((suffix for suffix in SUFFIXES if inner.lower().endswith(suffix)), "")
    return (inner[: -len(ending)], name[len(inner) - len(ending) :]) if ending else (name, "")


def holds_rows(path: Path) -> bool:
    """Return whether a file has rows, by its suffix or parquet's first bytes; otherwise it is plain text."""
    if split_name(path.name)[1]:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_PARQUET)) == _PARQUET
    except OSError:
        return False  # reading it raises the error


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield location and content of each row, for :func:`as_row`.

    Returns:
        As content the bytes of a JSON line; for other formats the parsed row, or a ValueError that describes the fault.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    content = _content(path)
    if content.startswith(_PARQUET):
        return _parquet(path, content)
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    opening = content.lstrip()[:1]
    as_json = opening in (b"{", b"[") and (_is_json(lines[0][1]) or _is_json(content))
    if split_name(path.name)[1].lower().startswith(_TABLES) and not as_json:
        return _table(path, content)
    if opening == b"[" and (elements := _array(path, content, lines)) is not None:
        return ((f"{path}, row {number}", element) for number, element in enumerate(elements))
    _refuse_other_text(path, content, lines)
    return ((f"{path}:{number}", line) for number, line in lines)


def as_row(content: Any) -> Row:
    """Return a row's columns.

    Raises:
        ValueError: it is not text or not an object.
    """
    if isinstance(content, ValueError):
        raise content
    if isinstance(content, bytes):
        try:
            content = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text (byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from error
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds {type(content).__name__}, not an object of columns")
    return content


def read_text(path: Path) -> str:
    """Return the text of a file, which may be compressed.

    Raises:
        InputError: it cannot be read, or is not text.
    """
    content = _content(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data {path}: cannot be read as UTF-8 text (byte {error.start})") from error


def without_absent(row: Row) -> dict[str, Any]:
    """Return an Arrow row without the null fields of its structs: Arrow adds them for absent ones."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: present(inner) for name, inner in value.items() if inner is not None}
        return [present(inner) for inner in value] if isinstance(value, list) else value

    return {name: present(value) for name, value in row.items()}


def _content(path: Path) -> bytes:
    """Return a file's bytes, decompressed, and text as UTF-8 without a byte order mark.

    Raises:
        InputError: it cannot be read, or its format is not supported.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data {path}: cannot be read ({error.strerror})") from error
    for magic, (name, unpack) in _COMPRESSED.items():
        if content.startswith(magic):
            try:
                content = unpack(content)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise InputError(f"data {path}: is {name}-compressed data that cannot be unpacked ({error})") from error
            break
    if content.startswith(_PARQUET):
        return content
    for magic, (name, remedy) in _FOREIGN.items():
        if content.startswith(magic):
            raise InputError(f"data {path}: is {name}; {remedy}")
    encoding = json.detect_encoding(content[:4])
    if encoding.startswith("utf-8"):
        return content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode(encoding).encode()
    except UnicodeError as error:
        raise InputError(
            f"data {path}: looks like {encoding.upper()} text, but is not ({error}); save it as UTF-8"
        ) from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _array(path: Path, content: bytes, lines: list[tuple[int, bytes]]) -> list[Any] | None:
    """Return the elements of a JSON array; None for JSON lines whose first line is an array."""
    try:
        found: list[Any] = json.loads(content)
        return found
    except (ValueError, RecursionError) as error:
        if len(lines) > 1 and _is_json(lines[0][1]):
            return None
        raise InputError(
            f"data {path}: is a JSON array that cannot be read ({error}); fix it, or write one object a line"
        ) from error


def _refuse_other_text(path: Path, content: bytes, lines: list[tuple[int, bytes]]) -> None:
    """Raise one error for a text that is not JSON lines, instead of one for each line.

    Raises:
        InputError: an object spans several lines, or no line begins an object.
    """
    if not lines or _is_json(lines[0][1]):
        return
    text = content.decode("utf-8", "replace").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        value, end = None, 0
    if isinstance(value, dict) and len(text[:end].splitlines()) > 1:
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        filter_ = f"'.{lists[0]}[]'" if lists else "."
        raise InputError(
            f"data {path}: is JSON whose first object spans several lines (its keys are {', '.join(value)}); "
            f"write one row a line: jq -c {filter_} {path.name} > rows.jsonl"
        )
    if any(line.lstrip()[:1] in (b"{", b"[") for _, line in lines):
        return
    shown = lines[0][1].strip()[:40].decode("utf-8", "replace")
    remedy = "if it is CSV, name it so (.csv, or .tsv with tabs)"
    if shown.startswith("<"):
        remedy = "a web page or XML, as where a download went wrong: fetch the file itself"
    raise InputError(f"data {path}: is not JSON lines: no line begins with a brace, the first is {shown!r}; {remedy}")


def _table(path: Path, content: bytes) -> Iterator[tuple[str, Row | ValueError]]:
    """Yield the rows of a CSV file with the line on which each ends; the header's most frequent separator is used."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data {path}: is CSV, but not in UTF-8 (byte {error.start}); save it so: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        ) from error
    header = text.lstrip().partition("\n")[0]
    separators = ("\t", ",", ";") if ".tsv" in path.name.lower() else (",", ";", "\t")
    separator = max(separators, key=header.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = next((cells for cells in reader if cells), [])
        # A column without a name is an index that pandas wrote, or a trailing separator on every line.
        named = [name for name in names if name]
        if len(set(named)) < len(named):
            raise InputError(f"data {path}: two columns have the same name: {', '.join(names)}; rename one")
        for cells in reader:
            if len(cells) == len(names):
                yield f"{path}:{reader.line_num}", {n: cell for n, cell in zip(names, cells, strict=True) if n}
            elif cells:
                yield (
                    f"{path}:{reader.line_num}",
                    ValueError(
                        f"has {len(cells)} cells and the first line {len(names)}, separated by {separator!r}; put a "
                        "cell that holds a separator or a line end into quotes"
                    ),
                )
    except csv.Error as error:
        raise InputError(f"data {path}:{reader.line_num}: is not valid CSV ({error})") from error


def _parquet(path: Path, content: bytes) -> Iterator[tuple[str, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
        rows = [row for batch in table.to_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"data {path}: is a parquet file that cannot be read ({reason})") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", without_absent(row)
