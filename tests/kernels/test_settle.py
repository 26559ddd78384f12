"""The column loop's leaf in compiled code, against the loop's own steps in PyTorch."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import forked
import leaves
from sqft.core import columns
from sqft.core.columns import Pattern
from sqft.core.gptq import gptq
from sqft.kernels import build, settle

if not settle.available():
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.mark.parametrize(("name", "masked"), leaves.CASES)
def test_quantising(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves.check_quantising(settle, name, masked, monkeypatch)


@pytest.mark.parametrize("pattern", leaves.PATTERNS)
def test_pruning(pattern: Pattern | None, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves.check_pruning(settle, pattern, monkeypatch)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_threads_and_tiles_change_nothing(rows: int) -> None:
    weight, hessian, mask = leaves.problem(200)
    settings = {"bits": 4, "group_size": 32, "symmetric": False, "dtype": torch.float32}
    whole = gptq(weight, hessian, mask, **settings)  # type: ignore[arg-type]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        part = gptq(weight[:rows], hessian, mask[:rows], **settings)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    # The products between the leaves are the library's, which may add in another order for another width.
    assert (part.codes_OI == whole.codes_OI[:rows]).float().mean() > 0.999


def test_every_processor_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, factor = torch.randn(settle.LEAF, 100, generator=generator), torch.eye(settle.LEAF) + 0.01
    found = []
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        if capability in build.VECTORS and not getattr(torch.cpu, f"_is_{capability.lower()}_supported")():
            continue
        monkeypatch.setattr(build, "processor", lambda capability=capability: capability)
        monkeypatch.setattr(settle, "KERNEL", build.Kernel(settle._load, "said"))
        loop = columns.ColumnLoop(factor, weight.clone(), weight > -1, list(range(settle.LEAF)))
        settle.settle_leaf(loop, 0, settle.LEAF)
        found.append((loop.work_IO, loop.value_IO))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_without_a_compiler_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(settle, "KERNEL", build.Kernel(settle._load, settle.KERNEL._otherwise))
    with caplog.at_level(logging.INFO, "sqft"):
        assert not settle.available()
        assert not settle.available()
        assert "no C++ compiler" in str(settle.KERNEL.absence())
    assert caplog.text.count("columns are settled by PyTorch") == 1


def test_a_wrong_kernel_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, mask = leaves.problem()
    settings = {"bits": 4, "symmetric": False, "dtype": torch.float32, "group_size": 32}
    monkeypatch.setattr(columns, "kernel_on", lambda _: None)
    plain = gptq(weight, hessian, mask, **settings)  # type: ignore[arg-type]
    damped = gptq(weight, hessian, mask, damping=0.1, **settings)  # type: ignore[arg-type]
    assert (plain.codes_OI == damped.codes_OI).float().mean() < 0.99


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "build.py"
    script.write_text("from sqft.kernels import settle; assert settle.KERNEL.absence() is None")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = forked.run([], 2, script)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sqft").iterdir())) == 1
