"""Numbers in answers: how one is read from a text, when two are equal, and how one is written."""

from __future__ import annotations

import re

TOLERANCE = 0.001
# An exponent follows a number that no letter precedes: x2e5 is a name. It is whole: 1e5.5 is none.
_EXPONENT = r"[eE][-+]?\d+(?!\d|\.\d)"
_NUMBER = re.compile(rf"(?<![\d.])-?(?:(?<![A-Za-z])(?:\d+\.?\d*|\.\d+){_EXPONENT}|\d+\.?\d*|\.\d+)")
_MINUS = str.maketrans(dict.fromkeys("\N{MINUS SIGN}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}", "-"))


def final_number(text: str, marker: str = "") -> float | None:
    """Return the last number of a text, or with a marker the first that follows one and a space; None without any."""
    text = text.translate(_MINUS)
    if marker:
        # The pattern of lm-eval's gsm8k (strict-match), and an exponent.
        found = re.search(re.escape(marker.rstrip()) + rf" (-?[0-9.,]+(?:{_EXPONENT})?)", text)
        text = found[1].rstrip(".,") if found else ""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def same_number(predicted: float | None, right: float | None) -> bool:
    """Return whether two numbers agree within the tolerance; no number agrees with none.

    Of a right number that is smaller than the tolerance itself the tolerance is that share: zero is not 1e-05.
    """
    if predicted is None or right is None:
        return False
    return abs(predicted - right) <= TOLERANCE * (abs(right) if 0 < abs(right) < TOLERANCE else 1)


def short_number(value: str | float) -> str:
    """Return a number with at most four decimals, or as it is where that would be another number."""
    number = f"{float(value):.4f}".rstrip("0").rstrip(".")
    return number if same_number(float(number), float(value)) else str(value)
