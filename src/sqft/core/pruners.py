"""Pruners: which weights of a linear become zero, given how its inputs look on calibration data.

Shapes: O out features, I in features, B a block of columns.

Two kinds are registered by name. A *score* `(weight_OI, statistics) -> score_OI` only ranks; the lowest entries of
each row are zeroed and the others stay as they are (magnitude, Wanda). A *pruner*
`(weight_OI, statistics, pattern) -> (weight_OI, mask_OI)` may also change the weights that stay (SparseGPT).
Any other is named in a recipe by import path, 'package.module:function'; a function taking three arguments is a pruner.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sqft.core.columns import Pattern, prune_columns
from sqft.core.mask import mask_from_score
from sqft.core.statistics import Statistics
from sqft.errors import InputError

Score = Callable[[torch.Tensor, Statistics], torch.Tensor]
Pruner = Callable[[torch.Tensor, Statistics, Pattern], tuple[torch.Tensor, torch.Tensor]]


def magnitude(weight_OI: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Score |W| (Hagiwara 1994); the inputs do not count."""
    return weight_OI.float().abs()


def wanda(weight_OI: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Score |W| · ‖X_i‖₂ (Sun et al. 2023, equation 1; SQFT section 2.1).

    Differs from the reference: the norm is over all tokens rather than a running mean over samples; the two differ by
    a factor that is equal for all weights, so the ranking within a row is the same.
    """
    # The only copy is the score itself; the norm is not negative, so the sign can go last.
    return weight_OI.to(torch.float32, copy=True).mul_(statistics.squared_sum_I.sqrt()).abs_()


def sparsegpt(
    weight_OI: torch.Tensor, statistics: Statistics, pattern: Pattern, *, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune column by column and let the weights to the right make up for it (Frantar and Alistarh 2023, algorithm 1).

    Differs from the reference: the lowest entries are chosen per output row of each block of 128 columns, so every row
    ends with the same number of zeros; the reference takes one threshold for a whole block. What is zero already stays
    zero and is counted among the pruned.

    Args:
        weight_OI: [O, I], any float dtype.
        statistics: with a hessian.
        pattern: how much to prune.
        damping: added to the hessian's diagonal, as a fraction of its mean.

    Returns:
        (weight [O, I] in its own dtype, mask [O, I]).

    Raises:
        InputError: no hessian was collected, or an N:M pattern does not divide the row.
        NumericalError: the damped hessian is not positive definite.
    """
    hessian_II = statistics.hessian_II
    if hessian_II is None:
        raise InputError("this pruner needs second-order statistics, and none were collected")
    return prune_columns(weight_OI, hessian_II, weight_OI != 0, pattern=pattern, damping=damping)


_SCORES: dict[str, Score] = {"magnitude": magnitude, "wanda": wanda}
_PRUNERS: dict[str, Pruner] = {"sparsegpt": sparsegpt}
_NEEDS_HESSIAN = {"sparsegpt"}


def register_score(name: str, score: Score) -> None:
    """Make a score available to recipes as `method: name`."""
    _SCORES[name] = score


def register_pruner(name: str, pruner: Pruner, *, hessian: bool = True) -> None:
    """Make a pruner available to recipes as `method: name`; `hessian` asks for second-order statistics."""
    _PRUNERS[name] = pruner
    if hessian:
        _NEEDS_HESSIAN.add(name)


@dataclass(frozen=True)
class Method:
    """A resolved pruner.

    Attributes:
        prune: chooses the mask; a pruner of its own kind changes the weights that stay too.
        needs_hessian: whether it looks at second-order statistics.
        needs_inputs: whether it looks at inputs at all.
        only_ranks: whether it is a score, which leaves the weights that stay as they are.
    """

    prune: Pruner
    needs_hessian: bool
    needs_inputs: bool = True
    only_ranks: bool = False

    @property
    def in_loop(self) -> bool:
        """Whether it is SparseGPT, whose choice the quantiser's column loop can take over."""
        return self.prune is sparsegpt


def _as_pruner(score: Score) -> Pruner:
    def prune(weight_OI: torch.Tensor, statistics: Statistics, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
        mask = mask_from_score(score(weight_OI, statistics), pattern.sparsity, pattern.structure)
        # where, not a product: 0 * -1 is -0, and NaN * 0 is NaN.
        return torch.where(mask, weight_OI, 0.0), mask

    return prune


def resolve_method(name: str) -> Method:
    """Return the pruner that a recipe names.

    Raises:
        InputError: neither registered nor importable.
    """
    if name in _PRUNERS:
        return Method(_PRUNERS[name], name in _NEEDS_HESSIAN)
    if name in _SCORES:
        return Method(_as_pruner(_SCORES[name]), needs_hessian=False, needs_inputs=name != "magnitude", only_ranks=True)
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(sorted([*_SCORES, *_PRUNERS]))
        raise InputError(f"sparsify.method {name!r} is not known; use one of {known}, or 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"sparsify.method {name!r} cannot be imported: {error}") from error
    if len(inspect.signature(function).parameters) >= 3:
        return Method(function, needs_hessian=True)
    return Method(_as_pruner(function), needs_hessian=False, only_ranks=True)
