"""Run by test_columns.py in a process with TRITON_INTERPRET=1; also on a card, where the kernel runs compiled."""

from __future__ import annotations

import pytest
import torch

import leaves
from sqft.core.columns import Pattern
from sqft.kernels import columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("name", "masked"), leaves.CASES)
def test_quantising(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves.check_quantising(columns, name, masked, monkeypatch, DEVICE)


@pytest.mark.parametrize("pattern", leaves.PATTERNS)
def test_pruning(pattern: Pattern | None, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves.check_pruning(columns, pattern, monkeypatch, DEVICE)
