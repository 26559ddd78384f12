"""Formatting of numbers and names."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

ABSENT = "–"  # what no file states


def model_name(reference: str) -> str:
    """Return the short name of a model reference: its last part, without file endings."""
    return re.sub(r"(\.Q\d\w*)?\.gguf$", "", PurePosixPath(reference).name) or reference


def bytes_text(value: float | None) -> str:
    """Return a size in MB or GB (powers of ten)."""
    if value is None:
        return ABSENT
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{2 if unit == 'GB' else 1 if value < 100 * size else 0}f} {unit}"
    return f"{value:.0f} B"


def seconds_text(value: float | None) -> str:
    """Return a duration: '4.2 s', '3 min 05 s', '2 h 10 min'."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def percent_text(value: float | None) -> str:
    """Return a fraction in percent, with as many digits as it needs (at most two)."""
    return ABSENT if value is None else f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"


def number_text(value: Any) -> str:
    """Return a check's value or bound: short, exact where it is a count."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return ABSENT if value is None else str(value)
