"""Scores by hand, SparseGPT against a textbook loop, and the registry."""

import pytest
import torch

from sqft.core import columns
from sqft.core.pruners import (
    Pattern,
    Statistics,
    magnitude,
    register_pruner,
    register_score,
    resolve_method,
    sparsegpt,
    wanda,
)
from sqft.core.statistics import inverse_cholesky
from sqft.errors import InputError, NumericalError


def seen(x: torch.Tensor, *, hessian: bool = False) -> Statistics:
    statistics = Statistics.empty(x.shape[1], hessian=hessian)
    for part in x.split(3):
        statistics.add(part)
    return statistics


def test_wanda_by_hand() -> None:
    x = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    weight = torch.tensor([[1.0, -2.0], [-0.5, 10.0]])
    assert torch.allclose(wanda(weight, seen(x)), torch.tensor([[5.0, 4.0], [2.5, 20.0]]))
    assert torch.equal(magnitude(weight, seen(x)), weight.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_is_the_formula_to_the_bit_and_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 24, generator=generator), torch.randn(6, 24, generator=generator).to(dtype)
    before = weight.clone()
    assert torch.equal(wanda(weight, seen(x)), weight.abs().float() * seen(x).squared_sum_I.sqrt())
    assert torch.equal(weight, before)


def test_wanda_mask_equals_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 24, generator=generator), torch.randn(6, 24, generator=generator).bfloat16()
    pruned, mask = resolve_method("wanda").prune(weight, seen(x), Pattern(0.5))
    for row in range(6):
        scores = [abs(float(weight[row, i])) * float(x[:, i].norm()) for i in range(24)]
        lowest = sorted(range(24), key=lambda i: scores[i])[:12]
        assert set((~mask[row]).nonzero().flatten().tolist()) == set(lowest)
    assert torch.equal(pruned, torch.where(mask, weight, 0))
    assert not torch.signbit(pruned[~mask]).any()


def textbook_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, masked: list[list[int]]) -> torch.Tensor:
    """Optimal brain surgeon, column by column, from the full inverse: no Cholesky, no blocks."""
    weight = weight.double().clone()
    rows, columns = weight.shape
    for row in range(rows):
        inverse = torch.linalg.inv(hessian.double())
        for column in range(columns):
            if column in masked[row]:
                error = weight[row, column] / inverse[column, column]
                weight[row] -= error * inverse[column]
                weight[row, column] = 0
            # Columns to the left are done: remove this one from the problem.
            inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
            inverse[column], inverse[:, column] = 0, 0
    return weight.float()


@pytest.mark.parametrize("block", [4, 128])
def test_sparsegpt_equals_the_textbook_update(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(200, 12, generator=generator), torch.randn(5, 12, generator=generator)
    statistics = seen(x, hessian=True)
    pruned, mask = sparsegpt(weight, statistics, Pattern(0.5))
    assert (~mask).sum(dim=1).tolist() == [6] * 5
    hessian = 2 * x.T @ x / 200
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    expected = textbook_sparsegpt(weight, hessian, [(~row).nonzero().flatten().tolist() for row in mask])
    assert torch.allclose(pruned, expected, atol=1e-3)


def test_sparsegpt_loses_less_than_magnitude() -> None:
    generator = torch.Generator().manual_seed(2)
    # Correlated channels, as real activations have: what one loses the others can make up for.
    common = torch.randn(500, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    x, weight = common + 0.5 * torch.randn(500, 64, generator=generator), torch.randn(16, 64, generator=generator)
    statistics = seen(x, hessian=True)

    def loss(method: str) -> float:
        pruned, _ = resolve_method(method).prune(weight, statistics, Pattern(0.5))
        return float((x @ (pruned - weight).T).square().mean())

    assert loss("sparsegpt") < 0.5 * loss("wanda") < 0.6 * loss("magnitude")


def test_sparsegpt_keeps_two_of_four() -> None:
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(3))
    _, mask = sparsegpt(torch.randn(4, 16), seen(x, hessian=True), Pattern(0.5, (2, 4)))
    assert (mask.view(4, 4, 4).sum(dim=-1) == 2).all()


def test_inverse_cholesky_by_definition_and_its_refusals() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(4))
    hessian = x.T @ x
    factor = inverse_cholesky(hessian, damping=0.0)
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(hessian), atol=1e-5)
    with pytest.raises(NumericalError, match="not positive definite with damping"):
        inverse_cholesky(-torch.eye(4) * 5 + torch.ones(4, 4), damping=0.0)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        inverse_cholesky(torch.full((2, 2), float("nan")), damping=0.01)


def test_your_own_score_and_pruner_by_name_and_by_path() -> None:
    register_score("first", lambda weight, statistics: -torch.arange(weight.shape[1]).float().expand_as(weight))
    pruned, _ = resolve_method("first").prune(torch.ones(2, 4), Statistics.empty(4, hessian=False), Pattern(0.5))
    assert pruned.tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    register_pruner("nothing", lambda weight, statistics, pattern: (weight, weight != 0))
    assert resolve_method("nothing").needs_hessian
    assert not resolve_method("sqft.core.pruners:magnitude").needs_hessian
    assert resolve_method("sqft.core.pruners:sparsegpt").needs_hessian


@pytest.mark.parametrize(
    ("name", "message"), [("wnda", "not known; use one of"), ("no.such:thing", "cannot be imported")]
)
def test_an_unknown_method_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_method(name)
