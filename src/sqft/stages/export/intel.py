"""optimum-intel and OpenVINO: where they are, what they know, and one run of them.

optimum-intel needs an earlier transformers than this environment's, and :mod:`intel_hook` replaces internals, so the
versions are pinned; see :mod:`environment`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.errors import InputError
from sqft.stages.export.environment import cached, pip_into, run_python

VERSION = "2.2.0"
# torch, compressed-tensors and numpy are those of this environment.
REQUIREMENTS = (
    f"optimum-intel=={VERSION}",
    "optimum==2.3.0",
    "openvino==2026.4.1",
    "nncf==3.4.0",
    "pydot==4.0.1",
    "transformers==5.5.4",
    "tokenizers==0.22.2",
)
_HOOK = Path(__file__).with_name("intel_hook.py")
_NAME = "optimum-intel"
# Read, not imported: importing it takes torch, and seconds.
_LIST = """
import ast, importlib.util, json
from pathlib import Path
known = set()
for place in importlib.util.find_spec("optimum").submodule_search_locations:
    for node in ast.walk(ast.parse(Path(place, "exporters", "openvino", "model_configs.py").read_text())):
        if isinstance(node, ast.Call) and "'text-generation-with-past'" in ast.unparse(node):
            known.update(a.value for a in node.args if isinstance(a, ast.Constant))
print(json.dumps(sorted(known)))
"""


@dataclass(frozen=True)
class Optimum:
    """How to run optimum-intel.

    Attributes:
        python: the interpreter.
        paths: folders in which it finds it before its own packages.
    """

    python: Path
    paths: tuple[Path, ...] = ()

    def model_types(self) -> list[str]:
        """Return the model types whose text generation it exports, as config.json names them."""
        known: list[str] = json.loads(run_python(self.python, self.paths, _NAME, "-c", _LIST).splitlines()[-1])
        return known

    def run(self, job: Path, **values: Any) -> None:
        """Write a job's file and do it; see :mod:`intel_hook`."""
        job.write_text(json.dumps(values))
        run_python(self.python, self.paths, _NAME, str(_HOOK), str(job))


def cache() -> Path:
    """Return the folder in which the pinned packages lie, or will."""
    return cached(f"optimum-intel-{VERSION}")


def given(place: Path | None) -> Optimum | None:
    """Return the packages that the user names, or the pinned ones if they are there already.

    Args:
        place: a Python interpreter that has them, or the folder in which they lie; None is the pinned ones.

    Raises:
        InputError: there are none.
    """
    if place is None:
        return Optimum(Path(sys.executable), (cache(),)) if cache().is_dir() else None
    if place.is_dir() and (place / "optimum").is_dir():
        return Optimum(Path(sys.executable), (place.absolute(),))
    if place.is_file() and os.access(place, os.X_OK):
        return Optimum(place.absolute())
    raise InputError(
        f"--converter {place}: is neither a folder into which pip put optimum-intel nor a Python interpreter; leave it "
        f"out for the pinned one ({REQUIREMENTS[0]})"
    )


def install() -> Optimum:
    """Return the pinned packages, put into the cache by pip where they are not there.

    Raises:
        InputError: pip failed; with what it said.
    """
    remedy = "run again with pip and an index that has it, or give a Python that has it with --converter"
    pip_into(cache(), REQUIREMENTS, _NAME, remedy)
    return Optimum(Path(sys.executable), (cache(),))
