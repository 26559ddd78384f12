"""What the kernels that settle a leaf of the column loop are held to: the loop's own steps in PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from sqft.core import columns
from sqft.core.columns import Pattern, prune_columns
from sqft.core.gptq import gptq

SETTINGS: dict[str, dict[str, Any]] = {
    "act_order": {"group_size": 32},
    "own order": {"group_size": 16, "act_order": False},
    "rows": {"group_size": None},
    "3 bits, symmetric": {"bits": 3, "group_size": 48, "symmetric": True},
    "8 bits": {"bits": 8, "group_size": 32},
    "update": {"group_size": 32, "update": True},
    "chosen in the loop": {"group_size": 32, "pattern": Pattern(0.5)},
    "2:4 in the loop": {"group_size": 32, "pattern": Pattern(0.5, (2, 4))},
}
CASES = [*((name, True) for name in SETTINGS), ("act_order", False)]
PATTERNS = [None, Pattern(0.5), Pattern(0.5, (4, 8))]


def problem(rows: int = 40, width: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, width, generator=generator) @ torch.randn(width, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator)
    mask = torch.rand(rows, width, generator=generator) > 0.5
    return weight, inputs.T @ inputs, mask


def with_and_without(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, Any, list[int]]:
    """Return what the loop gives without and with the kernel, and the widths of the leaves that the kernel settled."""
    monkeypatch.setattr(columns, "kernel_on", lambda _: None)
    plain = call()
    leaves: list[int] = []
    settle = kernel.settle_leaf

    def counted(loop: Any, start: int, stop: int) -> None:
        leaves.append(stop - start)
        settle(loop, start, stop)

    monkeypatch.setattr(kernel, "settle_leaf", counted)
    monkeypatch.setattr(columns, "kernel_on", lambda _: kernel)
    return plain, call(), leaves


def check_quantising(
    kernel: ModuleType, name: str, masked: bool, monkeypatch: pytest.MonkeyPatch, device: str = "cpu"
) -> None:
    """Compare GPTQ with and without the kernel."""
    weight, hessian, mask = (tensor.to(device) for tensor in problem())
    settings = {"bits": 4, "symmetric": False, "dtype": torch.float32, **SETTINGS[name]}
    plain, fused, leaves = with_and_without(
        kernel, monkeypatch, lambda: gptq(weight, hessian, mask if masked else None, **settings)
    )
    assert (sum(leaves) == weight.shape[1]) is (name != "2:4 in the loop")
    # A sum that lies between two codes to rounding may fall on either side, and moves what comes after it.
    same = plain.codes_OI == fused.codes_OI
    assert same.float().mean() > 0.999
    assert torch.equal(plain.grid.zero_OG, fused.grid.zero_OG)
    torch.testing.assert_close(plain.grid.scale_OG, fused.grid.scale_OG)
    if plain.mask_OI is not None:
        assert (plain.mask_OI == fused.mask_OI).float().mean() > 0.999
        assert bool((fused.codes_OI == fused.grid.zero_codes())[~fused.mask_OI].all())


def check_pruning(
    kernel: ModuleType, pattern: Pattern | None, monkeypatch: pytest.MonkeyPatch, device: str = "cpu"
) -> None:
    """Compare pruning with and without the kernel."""
    weight, hessian, mask = (tensor.to(device) for tensor in problem(33, 70 if pattern is None else 64))
    given = mask if pattern is None else None
    plain, fused, leaves = with_and_without(
        kernel, monkeypatch, lambda: prune_columns(weight, hessian, given, pattern=pattern)
    )
    assert bool(leaves) is (pattern is None or pattern.structure is None)
    assert (plain[1] == fused[1]).float().mean() > 0.999
    close = torch.isclose(plain[0], fused[0], rtol=1e-3, atol=1e-4)
    assert close.float().mean() > 0.999
    assert bool((fused[0][~fused[1]] == 0).all())
