"""What every export refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft.disk import read_json
from sqft.errors import InputError
from sqft.storage.integers import quantization_config


def quantized_config(model: Path, float_remedy: str) -> dict[str, Any]:
    """Return a quantised model's config.

    Args:
        model: its folder.
        float_remedy: what to do with a float model.

    Raises:
        InputError: an adapter, or a float model; says what to do instead.
    """
    if (model / "adapter_config.json").is_file():
        raise InputError("is an adapter, not a model; merge it into its base first: sqft merge BASE ADAPTER MERGED")
    if quantization_config(model) is None:
        raise InputError(f"is a float model, whose weights lie on no grid; {float_remedy}")
    return read_json(model / "config.json")
