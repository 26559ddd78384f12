"""Kill work at every change that it makes to a folder, and see that the same work then ends as if nothing had happened.

A kill at a random moment finds what is likely; this finds what is possible. A child process is killed (SIGKILL) just
before its n-th change, for every n: creating, writing, renaming or deleting a file or folder under a root. Whatever
that leaves, the work is done again, undisturbed, and its files must be those of a run that was never killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

Work = Callable[[Path], None]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_METHODS = {"flush", "__exit__", "truncate"}  # where what was written reaches the file; before, it is empty


def kill_everywhere(work: Work, root: Path, *, every: int = 1) -> int:
    """Kill `work(folder)` before each (or each `every`-th) of its changes; return the number of kills.

    Args:
        work: what is done to an empty or half-finished folder; it may be called again on what a kill left.
        root: an empty folder, in which one folder a kill is made.
        every: the stride through the changes.

    Raises:
        AssertionError: after a kill the work fails, or ends with other files.
    """
    straight = root / "straight"
    assert _in_child(work, straight, 0) == 0, "the work fails undisturbed"
    wanted = contents(straight)
    for kills, place in enumerate(range(1, 1_000_000, every)):
        folder = root / f"kill-{place}"
        status = _in_child(work, folder, place)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, f"change {place}: ended with {status} and not by the kill"
        assert _in_child(work, folder, 0) == 0, f"after a kill before change {place} the work fails"
        found = contents(folder)
        differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        assert not differing, f"after a kill before change {place} these differ: {differing}"
    raise AssertionError("the work never ends")


def contents(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of what a user finds: all but hidden files, and records of time and cost."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix not in (".json", ".study", ".html", ".md")
    } | {str(path.relative_to(folder)): "folder" for path in folder.rglob("*") if path.is_dir() and path.name != "sqft"}


def _in_child(work: Work, folder: Path, place: int) -> int:
    """Do the work in a forked process that is killed before its change number `place` (0: never); return its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        folder.mkdir(exist_ok=True)
        if place:
            _arm(folder.resolve(), place)
        work(folder)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stderr.flush()
        os._exit(status)


def _arm(root: Path, place: int) -> None:
    """Kill this process just before the change number `place` under a root."""
    changes = 0

    def change() -> None:
        nonlocal changes
        changes += 1
        if changes == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def inside(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(f"{root}{os.sep}")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & _WRITING
            if writes and inside(path):
                change()
        elif event in _CHANGES and any(inside(path) for path in arguments[:2]):
            change()

    def profile(_frame: Any, event: str, argument: Any) -> None:
        writes = event == "c_call" and getattr(argument, "__name__", "") in _METHODS
        if writes and inside(getattr(getattr(argument, "__self__", None), "name", None)):
            change()

    sys.addaudithook(audit)
    sys.setprofile(profile)
