"""C++ kernels, built at first use by the system's compiler and loaded without PyTorch's headers.

A library lies in a folder of the user's cache (`XDG_CACHE_HOME`), under a name that is a hash of its sources, the
compiler and the flags: another version, compiler or processor builds another file, and nothing has to be deleted.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
ONE_BY_ONE = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
"""Flags of a kernel that rounds each operation by itself: no fused products. Comparisons can still be vectors."""
VECTORS = {"AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"), "AVX2": ("-mavx2",)}
"""Flags for what :func:`processor` names."""


class Kernel:
    """A kernel that is loaded when it is first asked for."""

    def __init__(self, load: Callable[[], ctypes.CDLL | str], otherwise: str) -> None:
        """Take what returns its library, or why there is none, and what is then said once: "OTHERWISE: why"."""
        self._load, self._otherwise = load, otherwise
        self._found: ctypes.CDLL | str | None = None
        self._said = False

    def absence(self) -> str | None:
        """Return why the kernel is not used on this machine; None where it is. The first call may build it."""
        if self._found is None:
            self._found = self._load()
        return self._found if isinstance(self._found, str) else None

    def library(self) -> ctypes.CDLL | None:
        """Return its library; one line says where there is none. The first call may build it."""
        why = self.absence()
        if why is not None and not self._said:
            logger.info("%s: %s", self._otherwise, why)
            self._said = True
        return self._found if isinstance(self._found, ctypes.CDLL) else None


def processor() -> str:
    """Return what PyTorch says of the processor's vectors: AVX512, AVX2, DEFAULT or another name."""
    return torch.backends.cpu.get_cpu_capability().split("_")[0]


def load(name: str, purpose: str, *flags: str) -> ctypes.CDLL | str:
    """Return the library built from `NAME.cpp` of this folder, or why there is none.

    Args:
        name: of the source.
        purpose: what the user is told while it is built: "building the kernel for PURPOSE".
        flags: of the compiler, besides those that every kernel has.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    sources = [path.read_text() for path in (_FOLDER / f"{name}.cpp", *sorted(_FOLDER.glob("*.h")))]
    hashed = hashlib.sha256("\0".join((*sources, compiler, *_FLAGS, *flags)).encode()).hexdigest()[:16]
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqft" / f"{name}-{hashed}.so"
    try:
        if not place.is_file() and (said := _build(name, purpose, compiler, flags, place)):
            return said
        return ctypes.CDLL(str(place))
    except OSError as error:
        return f"{place}: the kernel cannot be written or opened ({error})"


def _build(name: str, purpose: str, compiler: str, flags: tuple[str, ...], place: Path) -> str | None:
    """Compile a kernel to a file that is whole or not there, whoever else does; return what is wrong."""
    place.parent.mkdir(parents=True, exist_ok=True)
    logger.info("building the kernel for %s with %s (once)", purpose, compiler)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / place.name
        command = [*compiler.split(), *_FLAGS, *flags, str(_FOLDER / f"{name}.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - no shell
        except OSError:
            return f"no C++ compiler builds the kernel ({compiler}); install g++ or clang++, or name one in CXX"
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
            return f"{compiler} does not build the kernel: {said}"
        os.replace(made, place)
    return None
