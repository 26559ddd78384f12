"""File locks that the kernel releases however a process ends.

On a file system without locks (some network and user-space ones) work continues unlocked, with a warning.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sqft.errors import InputError

logger = logging.getLogger(__name__)


def _take(stream: IO[str], *, wait: bool) -> bool:
    """Take a lock on an open file; return False where another process has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "%s: the file system has no locks (%s); start one process at a time there", stream.name, error.strerror
        )
    return True


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    Raises:
        InputError: another process works in the folder, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = open(out / ".lock", "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise InputError(f"{out}: cannot be used as output folder ({error.strerror}); choose another --out") from error
    with stream:
        if not _take(stream, wait=False):
            raise InputError(f"{out}: another sqft process works there; wait for it or use another --out")
        yield


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time finish a folder that several may work on; waits for the others."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as stream:
        _take(stream, wait=True)
        yield


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Keep a folder in the making for this process: two would write into each other's files.

    Raises:
        InputError: another process makes it, or nothing can be written beside it.
    """
    lock = folder.parent / f".partial-{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "w")  # noqa: SIM115 - held until the folder is made
    except OSError as error:
        raise InputError(f"{folder}: cannot be made there ({error.strerror}); choose another --out") from error
    with stream:
        taken = _take(stream, wait=False)
        try:
            taken = taken and os.path.samestat(os.fstat(stream.fileno()), os.stat(lock))  # not one just removed
        except OSError:
            taken = False
        if not taken:
            raise InputError(f"{folder}: another sqft process is making it; wait for it or use another --out")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
