"""The column loop against SparseGPT written naively: one column at a time, everything updated at once, in float64."""

from __future__ import annotations

import pytest
import torch

from sqft.core import columns as columns_module
from sqft.core.columns import Choice, Pattern, prune_columns
from sqft.core.gptq import gptq
from sqft.core.grid import Grid
from sqft.core.mask import conforms, keep_highest, mask_from_score
from sqft.errors import InputError, NumericalError

ROWS, COLUMNS = 12, 48
BITS = 4


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and the hessian of correlated inputs: what one column loses others can make up for."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(400, 6, generator=generator) @ torch.randn(6, COLUMNS, generator=generator)
    x = common + 0.5 * torch.randn(400, COLUMNS, generator=generator)
    return torch.randn(ROWS, COLUMNS, generator=generator), x.T @ x


def least(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: float(scores[i]))[:count]


def naive(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor | None,
    structure: tuple[int, int] | None,
    block: int,
    group: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frantar and Alistarh 2023, algorithm 1; a mask that is given takes the place of its choice.

    A grid's group is fitted to its weights as they are when the loop reaches it, pruned ones at 0.
    """
    work = weight.double().clone()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(COLUMNS, dtype=torch.double)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    out = torch.zeros_like(work)
    for j in range(COLUMNS):
        known = kept.clone()
        if mask is None and j % block == 0:
            part = range(j, min(j + block, COLUMNS))
            width = structure[1] if structure else len(part)
            for row in range(ROWS):
                for first in range(j, part.stop, width):
                    some = range(first, first + width)
                    score = torch.stack([(work[row, k] / factor[k, k]) ** 2 for k in some])
                    for k in least(score, width - structure[0] if structure else width // 2):
                        kept[row, first + k] = False
        if group is not None and j % group == 0:
            # A group that is wider than a block is fitted before the masks of its blocks are known.
            here = (work * (kept if group <= block else known))[:, j : j + group].float()
            grid = Grid.fit(here, bits=BITS, group_size=None, symmetric=False, dtype=torch.bfloat16)
            scale, zero = grid.scale_OG[:, 0].double(), grid.zero_OG[:, 0].double()
        value = work[:, j].clone()
        if group is not None:
            value = scale * (((value / scale).round() + zero).clamp(0, 2**BITS - 1) - zero)
        out[:, j] = torch.where(kept[:, j], value, 0)
        error = (work[:, j] - out[:, j]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return out, kept


@pytest.mark.parametrize("group", [None, 12, 16, 48])
@pytest.mark.parametrize("structure", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("given", [True, False])
def test_the_loop_is_the_naive_algorithm(
    given: bool, structure: tuple[int, int] | None, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns_module, "_BLOCK", 24)  # two blocks a row, each of two groups of 12 or one of 16
    weight, hessian = problem()
    pattern = Pattern(0.5, structure)
    mask = None
    if given:
        score = weight.abs() * hessian.diagonal().sqrt()
        mask = mask_from_score(score, 0.5, structure)
    chosen = None if given else pattern
    if group is None:
        found, kept = prune_columns(weight, hessian, mask, pattern=chosen)
    else:
        quantized = gptq(
            weight, hessian, mask, bits=BITS, group_size=group, symmetric=False, dtype=torch.bfloat16, update=True,
            pattern=chosen,
        )  # fmt: skip
        found, kept = quantized.grid.dequantize(quantized.codes_OI), quantized.mask_OI
        assert kept is not None
        assert torch.equal(quantized.codes_OI[~kept], quantized.grid.zero_codes()[~kept])
    expected, wanted = naive(weight, hessian, mask, structure, Choice.of(pattern, COLUMNS, group).width, group)
    assert torch.equal(kept, wanted)
    assert not found[~kept].any()
    assert not torch.signbit(found[~kept]).any()
    # float32 against double: a tie may fall to the code beside it, and what follows with it.
    close = (found - expected).abs() < 1e-3
    assert close.all() if group is None else close.float().mean() > 0.99
    if not given:
        assert ((~kept).sum(dim=1) == COLUMNS // 2).all()
        assert structure is None or conforms(kept, *structure)


def lost(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((found - weight) @ hessian * (found - weight)).sum())


def test_what_is_pruned_is_made_up_for_with_a_grid_and_without() -> None:
    weight, hessian = problem()
    mask = mask_from_score(weight.abs(), 0.5)
    settings = {"bits": BITS, "group_size": 16, "symmetric": False, "dtype": torch.bfloat16}
    updated, kept = prune_columns(weight, hessian, mask)
    assert torch.equal(kept, mask)
    assert lost(updated, weight, hessian) < 0.5 * lost(weight * mask, weight, hessian)
    plain, joint = gptq(weight, hessian, mask, **settings), gptq(weight, hessian, mask, update=True, **settings)
    dequantised = [q.grid.dequantize(q.codes_OI) for q in (plain, joint)]
    assert lost(dequantised[1], weight, hessian) < 0.5 * lost(dequantised[0], weight, hessian)


def test_what_may_not_be_kept_is_counted_first_and_stays_zero() -> None:
    weight, hessian = problem()
    allowed = torch.ones_like(weight, dtype=torch.bool)
    allowed[:, :10] = False
    pruned, kept = prune_columns(weight, hessian, allowed, pattern=Pattern(0.5))
    assert not kept[:, :10].any()
    assert not pruned[:, :10].any()
    assert ((~kept).sum(dim=1) == COLUMNS // 2).all()


@pytest.mark.parametrize(("keep_n", "group_m"), [(2, 4), (1, 4), (3, 5), (4, 8)])
def test_a_groups_highest_are_those_of_the_mask_by_score_ties_too(keep_n: int, group_m: int) -> None:
    score = torch.randint(0, 4, (200, group_m), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(keep_highest(score.T, keep_n).T, mask_from_score(score, 0.5, (keep_n, group_m)))


@pytest.mark.parametrize("transposed", [True, False])
def test_the_weight_that_is_given_stays_as_it_is(transposed: bool) -> None:
    weight, hessian = problem()
    weight = weight.T.contiguous().T if transposed else weight
    before, mask = weight.clone(), weight.abs() > 0.7
    prune_columns(weight, hessian, mask)
    prune_columns(weight, hessian, mask, pattern=Pattern(0.5))
    gptq(weight, hessian, mask, bits=4, group_size=16, symmetric=False, dtype=torch.bfloat16, update=True)
    assert torch.equal(weight, before)
    assert torch.equal(mask, before.abs() > 0.7)


def test_no_mask_and_no_pattern_change_nothing() -> None:
    weight, hessian = problem()
    same, kept = prune_columns(weight, hessian, None)
    assert kept.all()
    assert torch.equal(same, weight)


@pytest.mark.parametrize(
    ("structure", "group", "width"),
    [(None, None, 128), (None, 64, 128), (None, 48, 96), (None, 576, 128), ((2, 4), None, 4), ((2, 4), 64, 4),
     ((2, 4), 6, 12)],
)  # fmt: skip
def test_no_block_cuts_a_group_or_a_pattern(structure: tuple[int, int] | None, group: int | None, width: int) -> None:
    assert Choice.of(Pattern(0.5, structure), 1152, group).width == width


def test_what_cannot_be_pruned_is_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(NumericalError, match="not positive definite"):
        prune_columns(weight, hessian - 2 * torch.diag(hessian.diagonal()), None, damping=1e-12)
    with pytest.raises(InputError, match="pattern 3:5 does not divide rows of 48 weights"):
        prune_columns(weight, hessian, None, pattern=Pattern(0.4, (3, 5)))
    weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="score has NaN"):
        prune_columns(weight, hessian, None, pattern=Pattern(0.5))
