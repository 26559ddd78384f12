"""Tools that only processes of their own import: where they lie, how pip puts them there, one run of Python with them.

They bring packages that must not stand beside those of this environment, so each lies in a folder of the user's cache,
made at first use, and is found before this environment's packages, of which it needs others (torch above all).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from sqft.disk import discard
from sqft.errors import InputError
from sqft.locks import exclusive

logger = logging.getLogger(__name__)


def cached(name: str) -> Path:
    """Return the folder in which a tool for this Python lies, or will."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return place / "sqft" / f"{name}-py{sys.version_info[0]}{sys.version_info[1]}"


def pip_into(folder: Path, requirements: tuple[str, ...], what: str, remedy: str) -> None:
    """Put packages, without what they depend on, into a folder that is whole or not there.

    Args:
        folder: as :func:`cached` names it; nothing is done where it is there.
        requirements: the packages, pinned.
        what: their name in messages.
        remedy: what to do where pip cannot.

    Raises:
        InputError: pip failed; with what it said.
    """
    with exclusive(folder):
        if folder.is_dir():
            return
        logger.info("installing %s into %s (once)", requirements[0], folder)
        partial = folder.with_name(f"{folder.name}.partial")
        discard(partial)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--target", str(partial), *requirements]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - no shell
        if done.returncode:
            said = "\n  ".join([line for line in done.stderr.splitlines() if "error" in line.lower()][-4:])
            raise InputError(f"{folder}: {what} could not be installed\n  {said}\n{remedy}")
        partial.rename(folder)


def run_python(python: Path, paths: tuple[Path, ...], what: str, *arguments: str) -> str:
    """Run Python, without the network, and return what it prints.

    Args:
        python: the interpreter.
        paths: folders in which it finds packages before its own.
        what: the tool's name in messages.
        arguments: of Python.

    Raises:
        InputError: it failed; with the end of what it said.
    """
    found = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONSAFEPATH": "1", "TQDM_DISABLE": "1"}
    environment = {**os.environ, **alone, "PYTHONPATH": found}
    done: subprocess.CompletedProcess[str]
    done = subprocess.run([str(python), *arguments], env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise InputError(f"{what} ({python}) failed:\n  {said}")
    return done.stdout
