"""Matrix products as PyTorch spells them, each seen as W Xᵀ: which operand may be a weight, and what its inputs are.

One table serves whoever has to know how a module uses a tensor (:mod:`sqft.model.uses`) and whoever has to see a
linear's inputs (:mod:`sqft.model.calibrate`). Shapes: E matrices in a batch, O out features, I in features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

_NAMES = {
    functional.linear: ("input", "weight"),
    torch.matmul: ("input", "other"),
    torch.Tensor.matmul: ("input", "other"),
    torch.Tensor.__matmul__: ("input", "other"),
    torch.Tensor.__rmatmul__: ("other", "input"),
    torch.mm: ("input", "mat2"),
    torch.Tensor.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
    torch.Tensor.bmm: ("input", "mat2"),
    torch.mv: ("input", "vec"),
    torch.Tensor.mv: ("input", "vec"),
    torch.addmm: ("bias", "mat1", "mat2"),
    torch.Tensor.addmm: ("bias", "mat1", "mat2"),
    torch.baddbmm: ("bias", "batch1", "batch2"),
    torch.Tensor.baddbmm: ("bias", "batch1", "batch2"),
}
"""Products of two operands, with their arguments' names; the last two are the operands."""
_GROUPED = {f for f in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None}
"""Rows of the first operand are cut into groups, one a matrix of the second."""


@dataclass(frozen=True)
class Product:
    """One operand of a product, as a weight, and the other as its inputs.

    Attributes:
        operand: the weight as it was passed.
        source: the other operand; the same object in products with the same inputs.
        weight: [O, I], or [E, O, I], a view of the operand; None where the product is of another form.
        inputs: [..., T, I], or [E, ..., T, I]; of a grouped product [T, I].
        ends: int [E]; of a grouped product the row of the inputs behind each group's last.
    """

    operand: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether the weight is one matrix, which takes all of the source."""
        return self.weight is not None and self.weight.ndim == 2

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return each matrix [O, I] with its inputs [T, I].

        In a batch of matrices, one a group of tokens, a row of zeros is a token that went to another: it is left out.
        """
        if self.weight is None or self.inputs is None:
            return
        width = self.weight.shape[-1]
        if self.alone:
            yield self.weight, self.inputs.reshape(-1, width)
            return
        start = 0
        for index, matrix in enumerate(self.weight):
            if self.ends is not None:
                stop = int(self.ends[index])
                yield matrix, self.inputs[start:stop]
                start = stop
                continue
            rows = self.inputs[index].reshape(-1, width)
            yield matrix, rows[rows.any(dim=-1)]


def products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[Product]:
    """Return a call's product twice, once with each operand as the weight; nothing where the call is no product."""
    kwargs = kwargs or {}
    if func in _GROUPED:
        return _grouped(*args, **kwargs)
    if func is torch.einsum:
        return _einsum(*args)
    names = _NAMES.get(func)
    if names is None:
        return []
    operands = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)][: len(names)][-2:]
    if len(operands) < 2 or not all(isinstance(operand, torch.Tensor) for operand in operands):
        return []
    left, right = operands if func is not torch.Tensor.__rmatmul__ else reversed(operands)
    if func is functional.linear:
        return [_second(left, right, right)] if right.ndim > 1 else []
    found = [_second(left, right, right.mT)] if right.ndim > 1 else []
    return [*found, _first(left, right)] if left.ndim > 1 else found


def _second(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor) -> Product:
    """Return X Wᵀ, the weight given as [.., O, I]."""
    return _batched(right, left, weight, left if left.ndim > 1 else left.unsqueeze(0))


def _first(left: torch.Tensor, right: torch.Tensor) -> Product:
    """Return W Xᵀ, the weight standing first; its source is never that of a weight that stands behind."""
    inputs = right.mT if right.ndim > 1 else right.unsqueeze(0)
    return _batched(left, inputs, left, inputs)


def _batched(operand: torch.Tensor, source: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor) -> Product:
    """Return a product of matrices [.., O, I] with inputs [.., T, I], the axes in front aligned as matmul does."""
    stacked = [k for k in range(-weight.ndim, -2) if weight.shape[k] > 1]
    if len(stacked) > 1:
        return Product(operand, source)
    front = [slice(None) if k in stacked else 0 for k in range(-weight.ndim, -2)]
    weight = weight[tuple(front)]
    if stacked:
        (axis,) = stacked
        if inputs.ndim < -axis or inputs.shape[axis] == 1:  # one input for all of them
            inputs = inputs.unsqueeze(0).expand(weight.shape[0], *inputs.shape)
        else:
            inputs = inputs.movedim(axis, 0)
    return Product(operand, source, weight, inputs)


def _grouped(mat_a: torch.Tensor, mat_b: torch.Tensor, offs: torch.Tensor | None = None, **_: Any) -> list[Product]:
    if mat_b.ndim != 3 or mat_a.ndim != 2 or offs is None:
        return [Product(mat_b, mat_a), Product(mat_a, mat_b)]
    return [Product(mat_b, mat_a, mat_b.mT, mat_a, offs)]


def _einsum(equation: Any, *operands: Any) -> list[Product]:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not all(isinstance(operand, torch.Tensor) for operand in operands):
        return []
    if len(operands) != 2:
        return [Product(operand, operands[0]) for operand in operands] if len(operands) > 2 else []
    left, right = operands
    terms, _, out = equation.replace(" ", "").partition("->")
    first, second = (_spelled(term, x.ndim) for term, x in zip(terms.split(","), operands, strict=True))
    if "->" not in equation:
        both = first + second
        out = "".join(sorted(letter for letter in set(both) if both.count(letter) == 1 or letter < "A"))
    elif "..." in out:
        out = out.replace("...", "".join(sorted({x for x in first + second if x < "A"})))
    return [_labelled(right, left, second, first, out), _labelled(left, right, first, second, out)]


def _spelled(term: str, dimensions: int) -> str:
    """Return a term with its ellipsis spelled out in digits, counted from the right, as einsum aligns them."""
    if "..." not in term:
        return term
    missing = dimensions - len(term) + 3
    return term.replace("...", "".join(str(place) for place in reversed(range(missing))))


def _labelled(operand: torch.Tensor, source: torch.Tensor, own: str, other: str, out: str) -> Product:
    """Return an einsum's operand as a weight, where it has one axis of outputs, one of inputs and at most one more."""
    contracted = [x for x in own if x in other and x not in out]
    free = [x for x in own if x not in other and x in out]
    batch = [x for x in own if x in other and x in out]
    plain = len(set(own)) == len(own) == len(batch) + 2 and len(set(other)) == len(other) and len(batch) < 2
    if not plain or len(contracted) != 1 or len(free) != 1:
        return Product(operand, source)
    weight = operand.permute([own.index(x) for x in (*batch, *free, *contracted)])
    rest = [x for x in other if x not in batch and x not in contracted]
    inputs = source.permute([other.index(x) for x in (*batch, *rest, *contracted)])
    return Product(operand, source, weight, inputs.flatten(len(batch), -2) if rest else inputs.unsqueeze(-2))
