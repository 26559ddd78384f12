"""The dry run of what a GPU is asked to show, so that its first minute is not spent on the script's own faults."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_every_section_runs_at_toy_shapes_on_a_cpu(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = ["exact", "layer", "compress"]  # `run` is the doctor's run, which has a test of its own
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--out", str(tmp_path), "--only", *sections])
    gpu.main()
    found = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert found.keys() == {"machine", *sections}
    assert not [name for name in sections if "error" in found[name]], capsys.readouterr().out[-3000:]
    assert found["exact"]["passed"] and found["exact"]["elements_that_differ"] == 0
    assert found["layer"]["rows"][0]["masked_ms"] > 0
    assert found["compress"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_a_bit_that_differs_is_counted_and_a_failed_section_recorded(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    import gpu

    one = torch.ones(3, dtype=torch.bfloat16)
    assert gpu.different(one, one.clone()) == 0
    assert gpu.different(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1

    def broken(*_: object) -> dict[str, object]:
        raise RuntimeError("no card")

    monkeypatch.setattr(gpu, "exact", broken)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--out", str(tmp_path), "--only", "exact"])
    gpu.main()
    assert json.loads((tmp_path / "gpu_dry_run.json").read_text())["exact"]["error"] == "RuntimeError: no card"
