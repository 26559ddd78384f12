"""Every spelling of a matrix product gives the weight as [O, I] and its own inputs, checked by multiplying them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sqft.model.products import Product, products

E, OUT, IN, T = 3, 5, 4, 6


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += products(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SINGLE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda w, x: functional.linear(x, w),
    "linear by names": lambda w, x: functional.linear(input=x, weight=w),
    "matmul": lambda w, x: torch.matmul(x, w.T),
    "operator": lambda w, x: x @ w.T,
    "mm": lambda w, x: x.mm(w.T),
    "addmm": lambda w, x: torch.addmm(torch.zeros(OUT), x, w.T),
    "weight first": lambda w, x: (w @ x.T).T,
    "vector": lambda w, x: torch.stack([torch.mv(w, row) for row in x]),
    "einsum": lambda w, x: torch.einsum("ti,oi->to", x, w),
    "einsum, weight first": lambda w, x: torch.einsum("oi,...i->...o", w, x),
    "einsum without an output": lambda w, x: torch.einsum("ab,cb", x, w),
    "flattened": lambda w, x: (x.view(2, 3, IN) @ w.T).view(T, OUT),
}
STACKED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bmm": lambda w, x: torch.bmm(x, w.mT),
    "baddbmm": lambda w, x: torch.baddbmm(torch.zeros(1), x, w.mT),
    "matmul": lambda w, x: x @ w.mT,
    "weight first": lambda w, x: (w @ x.mT).mT,
    "broadcast": lambda w, x: (w[:, None] @ x[:, None].mT)[:, 0].mT,
    "einsum": lambda w, x: torch.einsum("eti,eoi->eto", x, w),
    "einsum, experts last": lambda w, x: torch.einsum("eoi,tei->eto", w, x.transpose(0, 1)),
}


def outputs_by_weight(found: list[Product], storage: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the matrices of the products whose operand lies in a tensor, with their inputs."""
    own = storage.untyped_storage().data_ptr()
    return [pair for p in found if p.operand.untyped_storage().data_ptr() == own for pair in p.matrices()]


@pytest.mark.parametrize("spelling", SINGLE)
def test_a_weight_and_its_inputs_make_the_output(spelling: str) -> None:
    weight, x, seen = draw(OUT, IN), draw(T, IN), Seen()
    with seen:
        expected = SINGLE[spelling](weight, x)
    pairs = outputs_by_weight(seen.found, weight)
    assert all(torch.equal(w, weight) for w, _ in pairs)
    assert torch.allclose(torch.cat([i @ w.T for w, i in pairs]), expected, atol=1e-6)


@pytest.mark.parametrize("spelling", STACKED)
def test_each_of_a_stack_has_inputs_of_its_own(spelling: str) -> None:
    weight, x, seen = draw(E, OUT, IN), draw(E, T, IN), Seen()
    with seen:
        expected = STACKED[spelling](weight, x)
    pairs = outputs_by_weight(seen.found, weight)
    assert [w.tolist() for w, _ in pairs] == weight.tolist()
    for index, (w, inputs) in enumerate(pairs):
        assert torch.allclose(inputs @ w.T, expected[index], atol=1e-6)


def test_a_grouped_product_is_cut_into_its_groups() -> None:
    weight, x, seen = draw(E, IN, OUT).bfloat16(), draw(T, IN).bfloat16(), Seen()
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    found = products(functional.grouped_mm, (x, weight), {"offs": ends})
    del seen
    pairs = [pair for product in found for pair in product.matrices()]
    assert [len(inputs) for _, inputs in pairs] == [2, 0, 4]
    assert torch.equal(torch.cat([inputs for _, inputs in pairs]), x)
    assert all(torch.equal(w, weight[index].T) for index, (w, _) in enumerate(pairs))


def test_a_token_that_went_to_another_expert_is_no_input() -> None:
    weight, x, seen = draw(2, IN, OUT), draw(2, T, IN), Seen()
    x[0, 3:] = 0
    with seen:
        torch.bmm(x, weight)
    pairs = outputs_by_weight(seen.found, weight)
    assert [len(inputs) for _, inputs in pairs] == [3, T]


@pytest.mark.parametrize(
    "product",
    [
        lambda w, x: torch.einsum("ti,ihd->thd", x, w),  # two axes of outputs
        lambda w, x: torch.einsum("ti,ihd,t->thd", x, w, x[:, 0]),
    ],
)
def test_a_product_of_another_form_has_no_matrix(product: Any) -> None:
    weight, x, seen = draw(IN, 2, 3), draw(T, IN), Seen()
    with seen:
        product(weight, x)
    found = [p for p in seen.found if p.operand is weight]
    assert found
    assert not [pair for p in found for pair in p.matrices()]
