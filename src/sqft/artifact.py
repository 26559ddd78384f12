"""A stage's folder and its manifest: whole or absent, traceable to its inputs, never overwritten.

A stage works in `OUT/.partial-NAME`; the folder is renamed to `OUT/NAME` at the very end, after its manifest and a
sync to disk, so a stage folder that exists is whole. The manifest (`sqft/manifest.json`) records the stage's settings,
the digests of its inputs, seed, versions, cost, and the digest of every file it wrote.

A stage is skipped when its folder exists with the same *key*: the hash of stage, settings, input digests and seed.
A folder with another key belongs to another recipe and is refused, with the settings that differ; nothing of a user's
is ever deleted to make room. Versions are recorded but are not in the key: upgrading a library does not orphan a run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqft.errors import InputError, Problems
from sqft.memory import costing

MANIFEST = Path("sqft") / "manifest.json"
DESCRIPTION = Path("sqft") / "description.json"
PACKAGES = ("sqft", "torch", "transformers", "peft", "lm_eval", "safetensors")


@dataclass(frozen=True)
class Artifact:
    """A finished stage folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of its files."""
        return str(self.manifest["digest"])

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read a stage folder.

        Raises:
            InputError: the folder has no readable manifest.
        """
        path = Path(path)
        try:
            return cls(path, json.loads((path / MANIFEST).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: has no readable {MANIFEST}; it was not written by sqft ({error})") from error


@dataclass
class Draft:
    """A stage folder in the making; `path` is the partial folder that the stage fills."""

    path: Path
    result: dict[str, Any] = field(default_factory=dict)


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest_file(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex; remembered within the process for unchanged files."""
    stat = os.stat(path)
    return _digest_file(str(path), stat.st_size, stat.st_mtime_ns)


def file_digests(folder: Path) -> dict[str, str]:
    """Return {relative name: SHA-256} of a folder's files, without the manifest itself and hidden files."""
    names = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): digest_file(p)
        for p in names
        if p.relative_to(folder) != MANIFEST and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }


def digest_input(path: str | Path) -> str:
    """Return what identifies an input: a stage folder's own digest, else one over the files that stand in it.

    Documents (*.md) and folders inside it do not count: a model is the same with a README mended or an adapter beside.

    Raises:
        InputError: there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"input {path}: no such file or folder")
    if path.is_file():
        return digest_file(path)
    if (path / MANIFEST).is_file():
        return Artifact.open(path).digest
    counted = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".") and p.suffix != ".md"]
    return digest_text(json.dumps({p.name: digest_file(p) for p in counted}, sort_keys=True))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is whole or unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as stream:
        json.dump(value, stream, indent=2, sort_keys=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse a stage that would fill the disk.

    Raises:
        InputError: less than `needed_bytes` are free where `folder` will be.
    """
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise InputError(
            f"{folder}: {what} needs {needed_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; "
            "free some or choose another --out"
        )


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process; released by the kernel however the process ends.

    Raises:
        InputError: another process works in the folder, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = open(out / ".lock", "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise InputError(f"{out}: cannot be used as output folder ({error.strerror}); choose another --out") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{out}: another sqft process works there; wait for it or use another --out") from error
        yield


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time finish a folder that several may work on; waits for the others."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def describe(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str | Path], seed: int) -> dict[str, Any]:
    """Return what a stage's result depends on; its hash is the key under which the stage is skipped."""
    return {
        "stage": stage,
        "config": dict(config),
        "inputs": {
            name: {"path": os.path.abspath(path), "digest": digest_input(path)} for name, path in inputs.items()
        },
        "seed": seed,
    }


def key_of(description: Mapping[str, Any]) -> str:
    """Return the hash of a description; the paths of inputs do not count, their digests do."""
    inputs = {name: value["digest"] for name, value in description["inputs"].items()}
    return digest_text(json.dumps({**description, "inputs": inputs}, sort_keys=True))


def finished(folder: Path, description: Mapping[str, Any]) -> Artifact | None:
    """Return the stage's artifact if it was already made with this description, None if it is still to be made.

    Raises:
        InputError: the folder, or unfinished work beside it, was made with other settings.
    """
    if not folder.exists():
        partial = partial_of(folder)
        # A folder with a description alone is of work that ended before it made anything: nothing would be lost.
        if any(p.is_file() and p != partial / DESCRIPTION for p in partial.rglob("*")):
            _refuse_foreign(partial, json.loads((partial / DESCRIPTION).read_text()), description)
        return None
    artifact = Artifact.open(folder)
    _refuse_foreign(folder, artifact.manifest, description)
    return artifact


def partial_of(folder: Path) -> Path:
    """Return the folder in which the stage works until it is done."""
    return folder.parent / f".partial-{folder.name}"


def _refuse_foreign(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
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
def writing(folder: Path, description: Mapping[str, Any], *, keep_partial: bool = False) -> Iterator[Draft]:
    """Make a stage folder that appears whole or not at all.

    Args:
        folder: the final folder; it must not exist.
        description: from :func:`describe`.
        keep_partial: leave an earlier partial folder in place (the stage resumes from it) instead of starting anew.

    Raises:
        InputError: the folder exists, another process is making it, or the disk filled up while writing.
    """
    partial = partial_of(folder)
    with _making(folder):
        yield from _write(folder, partial, description, keep_partial=keep_partial)


@contextmanager
def _making(folder: Path) -> Iterator[None]:
    """Hold a folder in the making for this process: two would write into each other's files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".partial-{folder.name}.lock"
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(stream.fileno()), os.stat(lock))  # not one that was just removed
        except OSError:
            held = False
        if not held:
            raise InputError(f"{folder}: another sqft process is making it; wait for it or use another --out")
        try:
            yield
        finally:
            lock.unlink()


def _write(folder: Path, partial: Path, description: Mapping[str, Any], *, keep_partial: bool) -> Iterator[Draft]:
    if folder.exists():
        raise InputError(f"{folder}: already exists; delete it or choose another folder")
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    draft = Draft(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / DESCRIPTION, description)
        with costing() as cost:
            yield draft
        _seal(draft, folder, description, cost)
    except BaseException as error:
        if not keep_partial:
            shutil.rmtree(partial, ignore_errors=True)
        if _disk_is_full(error):
            raise InputError(f"{partial}: the disk is full; free some space and run the same command again") from error
        raise


def _disk_is_full(error: BaseException) -> bool:
    """Tell whether an error means that; safetensors and torch report it in their own exceptions' text alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _seal(draft: Draft, folder: Path, description: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    """Write the manifest and give the partial folder its final name."""
    partial = draft.path
    digests = file_digests(partial)
    del digests[str(DESCRIPTION)]
    manifest = {
        **description,
        "key": key_of(description),
        "digest": digest_text(json.dumps(digests, sort_keys=True)),
        "files": digests,
        "versions": versions(),
        **cost,
        "size_bytes": sum((partial / name).stat().st_size for name in digests),
        "result": draft.result,
    }
    write_json(partial / MANIFEST, manifest)
    _sync(partial)
    (partial / DESCRIPTION).unlink()  # last: unfinished work without it could be taken for another recipe's
    os.rename(partial, folder)


def finished_result(path: Path, description: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a JSON result (verify.json, an evaluation) made with this description, None if it is still to be made.

    Raises:
        InputError: the file was made with other settings, or not by sqft.
    """
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        made_from = value["made_from"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not written by sqft ({error!r}); move it away or choose another --out") from error
    _refuse_foreign(path, made_from, description)
    return value


def write_result(path: Path, description: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON result with what it was made from; whole or not at all."""
    result = {**value, "versions": versions(), "made_from": dict(description)}
    write_json(path, result)
    return result


def _sync(folder: Path) -> None:
    """Force a folder's files to disk, so that the rename that follows never shows a half-written one."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
