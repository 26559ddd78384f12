"""Run something when a module is imported, whoever imports it and whenever: what needs a slow library waits for it."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call `action` once `name` is imported: now if it is, else at the end of its import.

    Args:
        name: a module outside any package.
        action: what it raises is raised by the import.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder:
    """Lets the other finders find the module, and adds the action to its loader."""

    # Not a subclass of importlib.abc's: importing that takes longer than all of `import sqft`.

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        position = sys.meta_path.index(self)
        del sys.meta_path[position]
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            # A module that is only looked for, as transformers looks for peft, is not imported yet.
            sys.meta_path.insert(position, self)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader.exec_module, spec)
        return spec

    def _extend(self, execute: Callable[[ModuleType], None], spec: ModuleSpec) -> None:
        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
