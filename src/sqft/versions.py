"""Which versions a result was made with; recorded, and in no key."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("sqft", "torch", "transformers", "peft", "lm_eval", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
