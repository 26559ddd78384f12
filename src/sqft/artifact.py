"""A stage's folder and its manifest: whole or absent, traceable to its inputs, never overwritten.

A stage works in `OUT/.partial-NAME`; the folder is renamed to `OUT/NAME` at the very end, after its manifest and a
sync to disk, so a stage folder that exists is whole. The manifest (`sqft/manifest.json`) records the stage's settings,
the digests of its inputs, seed, versions, cost, and the digest of every file it wrote.

A stage is skipped when its folder exists with the same *key*: the hash of stage, settings, input digests and seed.
A folder with another key belongs to another recipe and is refused, with the settings that differ; nothing of a user's
is ever deleted to make room. Versions are recorded but are not in the key: upgrading a library does not orphan a run.

A manifest is a record, not a proof: wherever a folder is used, as an input or as finished work, its bytes are hashed
and compared with it (:meth:`Artifact.check`).

What a kill can leave, and how the next run goes on: a partial folder without checkpoints, at whatever moment, is
discarded; one with checkpoints (`.checkpoints`, made after the description) is resumed from them; a whole folder that
still has the description or the checkpoints inside, which go after the rename, loses them. A folder is deleted by
renaming it first, so that no half-deleted one passes for work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.digests import digest_file, digest_files, digest_names, digest_text, file_digests, is_document, model_files
from sqft.disk import discard, disk_is_full, read_json, sync, sync_all, write_json
from sqft.errors import InputError, Problems
from sqft.locks import making
from sqft.memory import costing
from sqft.versions import versions

MANIFEST = Path("sqft") / "manifest.json"
DESCRIPTION = Path("sqft") / "description.json"
CHECKPOINTS = ".checkpoints"
DESCRIBED = {"stage": str, "config": dict, "inputs": dict, "seed": int}
_RECORDED = {**DESCRIBED, "digest": str, "files": dict, "result": dict}
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")  # the Hub's cache


@dataclass(frozen=True)
class Artifact:
    """A finished stage folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of its files, as the manifest has it."""
        return str(self.manifest["digest"])

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read a stage folder's manifest; :meth:`check` compares it with the folder's bytes.

        Raises:
            InputError: the folder has no readable manifest.
        """
        path = Path(path)
        try:
            return cls(path, _read_record(path / MANIFEST, _RECORDED))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: has no readable {MANIFEST}; it was not written by sqft ({error})") from error

    def check(self) -> Artifact:
        """Compare the folder with its manifest, byte by byte.

        Raises:
            InputError: names the files that have changed, are gone, or were added.
        """
        files: dict[str, str] = self.manifest["files"]
        where = f"{self.path} is no longer what its {MANIFEST} says"
        remedy = "get the folder back or make it again; one that was changed on purpose is used once that file is gone"
        with Problems(f"{where} ({remedy})") as problems:
            if digest_names(files) != self.digest:
                problems.add(f"{MANIFEST} contradicts itself")
            counted = {name: digest for name, digest in files.items() if not is_document(name)}
            there = [self.path / name for name in counted if os.path.isfile(self.path / name)]
            found = digest_files(self.path, there)
            for name, digest in counted.items():
                if found.get(name) != digest:
                    problems.add(f"{name} {'has changed' if name in found else 'is gone'}")
            for path in model_files(self.path):
                if str(path.relative_to(self.path)) not in files:
                    problems.add(f"{path.relative_to(self.path)} was added")
        return self


@dataclass
class Draft:
    """A stage folder in the making.

    Attributes:
        path: the partial folder that the stage fills.
        result: what the manifest says was found.
    """

    path: Path
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """A folder from which interrupted work goes on; it is no part of the result."""
        return self.path / CHECKPOINTS


def _read_record(file: Path, needed: Mapping[str, type]) -> dict[str, Any]:
    """Return a JSON object that has these entries.

    Raises:
        OSError, ValueError: it cannot be read, or something is missing.
    """
    return as_record(read_json(file), needed)


def as_record(value: Any, needed: Mapping[str, type]) -> dict[str, Any]:
    """Return a JSON value that is an object with these entries.

    Raises:
        ValueError: it is none, or lacks some of them.
    """
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, not an object")
    wrong = [name for name, kind in needed.items() if not isinstance(value.get(name), kind)]
    if wrong:
        raise ValueError(f"lacks {', '.join(wrong)}")
    if not all(isinstance(entry, dict) and isinstance(entry.get("digest"), str) for entry in value["inputs"].values()):
        raise ValueError("its inputs have no digests")
    return value


def digest_input(path: str | Path) -> str:
    """Return what identifies an input, from its bytes: a stage folder's digest, else one over the files that count.

    Raises:
        InputError: there is no such file or folder, or a stage folder is not what its manifest says.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"input {path}: no such file or folder")
    if path.is_file():
        return digest_file(path)
    if (path / MANIFEST).is_file():
        artifact = Artifact.open(path).check()
        # An archive is another form of what it was made of, and takes its place.
        packed = artifact.manifest["stage"] == "pack"
        return str(artifact.manifest["inputs"]["model"]["digest"]) if packed else artifact.digest
    return digest_names(digest_files(path, hashed_files(path)))


def hashed_files(path: Path) -> list[Path]:
    """Return the files whose bytes :func:`digest_input` reads."""
    if path.is_file():
        return [path]
    if (path / MANIFEST).is_file():
        return [path / name for name in Artifact.open(path).manifest["files"] if not is_document(name)]
    return model_files(path)


def describe(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str | Path], seed: int) -> dict[str, Any]:
    """Return what a stage's result depends on; its hash is the key under which the stage is skipped."""
    return {
        "stage": stage,
        "config": dict(config),
        "inputs": {name: _describe_input(path) for name, path in inputs.items()},
        "seed": seed,
    }


def _describe_input(path: str | Path) -> dict[str, Any]:
    """Return path and digest of an input, how many files and bytes were hashed, of a model of the Hub its revision."""
    digest, place = digest_input(path), os.path.abspath(path)
    files = hashed_files(Path(path))
    snapshot = _SNAPSHOT.search(place)
    counts = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    return {"path": place, "digest": digest, **counts} | ({"revision": snapshot[1]} if snapshot else {})


def key_of(description: Mapping[str, Any]) -> str:
    """Return the hash of a description; the paths of inputs do not count, their digests do."""
    inputs = {name: value["digest"] for name, value in description["inputs"].items()}
    return digest_text(json.dumps({**description, "inputs": inputs}, sort_keys=True))


def reuse(folder: Path, description: Mapping[str, Any]) -> Artifact | None:
    """Return the finished folder if it was made with this description, None if it is still to be made.

    Raises:
        InputError: the folder, or unfinished work beside it, was made with other settings, or the folder has changed.
    """
    if not folder.exists():
        partial = partial_of(folder)
        if _resumable(partial):
            try:
                unfinished = _read_record(partial / DESCRIPTION, DESCRIBED)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{partial}: is unfinished work with no readable {DESCRIPTION} ({error}), so whose it is cannot be "
                    "told; delete it, or choose another --out"
                ) from error
            refuse_foreign(partial, unfinished, description)
        return None
    artifact = Artifact.open(folder)
    refuse_foreign(folder, artifact.manifest, description)
    _tidy(folder)
    return artifact.check()


def partial_of(folder: Path) -> Path:
    """Return the folder in which the stage works until it is done."""
    return folder.parent / f".partial-{folder.name}"


def _resumable(partial: Path) -> bool:
    """Tell whether unfinished work holds anything that would be lost with it."""
    return any(path.is_file() for path in (partial / CHECKPOINTS).rglob("*"))


def refuse_foreign(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse what was made with another description.

    Args:
        folder: the folder or file, for the message.
        found: the description that it was made with.
        wanted: the description of this run.

    Raises:
        InputError: they differ; says in what.
    """
    if key_of({k: found[k] for k in wanted}) == key_of(wanted):
        return
    where = f"{folder} belongs to another recipe (delete it to make it again, or choose another --out)"
    with Problems(where) as problems:
        old = _flatten({"config": found["config"], "seed": found["seed"]})
        new = _flatten({"config": wanted["config"], "seed": wanted["seed"]})
        for name in {**new, **old}:
            before, now = old.get(name, "absent"), new.get(name, "absent")
            if before != now and "digest" in name:
                problems.add(f"its data has changed ({name.removeprefix('config.')})")
            elif before != now:
                problems.add(f"{name.removeprefix('config.')} was {before!r}, is now {now!r}")
        for name, value in wanted["inputs"].items():
            if found["inputs"].get(name, {}).get("digest") != value["digest"]:
                problems.add(f"its input {name} ({value['path']}) has changed")
        if not list(problems):
            problems.add("its settings differ from the recipe's")


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flatten(item, f"{prefix}{name}."))
        else:
            flat[prefix + name] = item
    return flat


@contextmanager
def writing(folder: Path, description: Mapping[str, Any]) -> Iterator[Draft]:
    """Make a stage folder that appears whole or not at all.

    Checkpoints that an earlier process left (:attr:`Draft.checkpoints`) are there; all else is made anew.

    Args:
        folder: the final folder; it must not exist.
        description: from :func:`describe`.

    Raises:
        InputError: the folder exists, another process is making it, or the disk filled up while writing.
    """
    with making(folder):
        if folder.exists():
            raise InputError(f"{folder}: already exists; delete it or choose another folder")
        partial = partial_of(folder)
        _clear(partial)
        draft = Draft(partial)
        try:
            write_json(partial / DESCRIPTION, description)
            with costing() as cost:
                yield draft
            _seal(draft, folder, description, cost)
        except BaseException as error:
            with suppress(OSError):
                _clear(partial)
            if disk_is_full(error):
                raise InputError(
                    f"{partial}: the disk is full; free some space and run the same command again"
                ) from error
            raise


def _clear(partial: Path) -> None:
    """Remove a partial folder; of one with checkpoints all but these and the description that says whose they are."""
    discard(partial.with_name(f"{partial.name}.trash"))
    if not _resumable(partial):
        discard(partial)
        return
    for path in partial.iterdir():
        if path.name == DESCRIPTION.parent.name:
            for inner in path.iterdir():
                if inner.name != DESCRIPTION.name:
                    discard(inner)
        elif path.name != CHECKPOINTS:
            discard(path)


def _tidy(folder: Path) -> None:
    """Remove from a whole folder what its making needed."""
    (folder / DESCRIPTION).unlink(missing_ok=True)
    if (folder / CHECKPOINTS).is_dir():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _seal(draft: Draft, folder: Path, description: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    """Write the manifest and give the partial folder its final name."""
    partial = draft.path
    digests = {
        name: digest for name, digest in file_digests(partial).items() if Path(name) not in (DESCRIPTION, MANIFEST)
    }
    manifest = {
        **description,
        "key": key_of(description),
        "digest": digest_names(digests),
        "files": digests,
        "versions": versions(),
        **cost,
        "size_bytes": sum((partial / name).stat().st_size for name in digests),
        "result": draft.result,
    }
    write_json(partial / MANIFEST, manifest)
    sync_all(partial)
    os.rename(partial, folder)
    sync(folder.parent)
    _tidy(folder)
