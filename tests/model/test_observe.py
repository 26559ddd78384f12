"""A forward is watched to its last target and no further, and only where that is known to be its last."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from sqft.model.observe import AllSeen, Observer
from sqft.model.targets import Target


class Block(nn.Module):
    """Two linears; the forward says when it has reached its end."""

    def __init__(self, *, twice: bool = False, routed: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.twice, self.routed, self.ends = twice, routed, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.twice:
            hidden = self.first(x + 1)
        if not self.routed or float(x.sum()) > 0:
            hidden = self.last(hidden)
        self.ends += 1
        return hidden


def observe(block: Block, batches: list[torch.Tensor]) -> Observer:
    observer = Observer({Target(name): linear.weight for name, linear in block.named_children()}, hessian=True)  # type: ignore[misc]
    for x in batches:
        with suppress(AllSeen), observer:
            block(x)
    return observer


BATCHES = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)).abs() for i in range(4)]


@torch.no_grad()
def test_what_is_seen_is_the_input_of_every_target_and_all_but_the_first_forward_end_early() -> None:
    block = Block()
    statistics = observe(block, BATCHES).statistics
    x = torch.cat(BATCHES)
    for name, inputs in (("first", x), ("last", block.first(x))):
        found = statistics[Target(name)]
        assert found.tokens == len(x)
        assert found.hessian_II is not None
        assert torch.allclose(found.hessian_II, inputs.T @ inputs, rtol=1e-5)
    assert block.ends == 1


@torch.no_grad()
@pytest.mark.parametrize("options", [{"twice": True}, {"routed": True}])
def test_a_forward_that_may_use_a_target_again_is_not_ended(options: dict[str, bool]) -> None:
    block = Block(**options)
    batches = [-BATCHES[0], *BATCHES[1:]] if "routed" in options else BATCHES
    statistics = observe(block, batches).statistics
    assert block.ends == len(batches)
    assert statistics[Target("first")].tokens == len(batches) * 3 * (2 if "twice" in options else 1)


@torch.no_grad()
def test_a_forward_that_does_not_reach_the_last_target_runs_to_its_end() -> None:
    block = Block(routed=True)
    assert observe(block, [BATCHES[0], -BATCHES[1], BATCHES[2]]).statistics[Target("last")].tokens == 6
    assert block.ends == 2
