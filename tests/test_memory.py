"""What goes back to the system when it is freed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sqft.memory import costing, release_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_pieces_between_others_go_back() -> None:
    large = torch.ones(30 * 2**18)
    del large  # freed, it makes glibc keep pieces of up to its size
    pieces = [torch.ones(2**20) for _ in range(64)]
    before = resident_bytes()
    kept = pieces[1::2]
    del pieces
    release_memory()
    assert before - resident_bytes() > 0.8 * sum(piece.nbytes for piece in kept)


def test_the_peak_of_a_card_is_told_where_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with costing() as cost:
        pass
    assert cost.keys() == {"seconds", "peak_memory_bytes"}
    calls = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 7)
    with costing() as cost:
        assert calls == ["reset"]
    assert cost["peak_gpu_bytes"] == 7
