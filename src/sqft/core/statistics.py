"""What calibration saw of a linear's inputs, and the factor of its inverse hessian that GPTQ and SparseGPT walk along.

Shapes: T tokens, I in features. The hessian of the layer's squared error is H = Σ x xᵀ; its scale never matters here.
Memory: H and one copy, in which its inverse and the factor are made: 8 · I² bytes at the highest.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sqft.core.mask import finite
from sqft.errors import NumericalError

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 384  # columns of the hessian that are accumulated together


@dataclass
class Statistics:
    """Sums over the calibration tokens.

    Attributes:
        squared_sum_I: sum of x², float32 [I].
        tokens: T, how many tokens were seen.
        upper_II: sum of x xᵀ, float32 [I, I], right only on and above its diagonal blocks; None where not asked for.
    """

    squared_sum_I: torch.Tensor
    tokens: int = 0
    upper_II: torch.Tensor | None = None

    @classmethod
    def empty(cls, in_features: int, *, hessian: bool, device: torch.device | None = None) -> Statistics:
        """Return statistics of no tokens."""
        if not hessian:
            return cls(torch.zeros(in_features, device=device))
        upper = torch.zeros(in_features, in_features, device=device)
        return cls(upper.diagonal(), 0, upper)

    def add(self, x_TI: torch.Tensor) -> None:
        """Take in a batch of inputs, any float dtype, [T, I]."""
        self.tokens += x_TI.shape[0]
        if self.upper_II is None:
            self.squared_sum_I += x_TI.float().square().sum(dim=0)
            return
        exact_in_bfloat16 = x_TI.dtype == torch.bfloat16
        x_TI = x_TI.float()
        with _bfloat16_products(exact_in_bfloat16):
            # H is symmetric: only the blocks on and above the diagonal are summed up.
            for start in range(0, x_TI.shape[1], _BLOCK):
                rows = slice(start, start + _BLOCK)
                self.upper_II[rows, start:].addmm_(x_TI[:, rows].T, x_TI[:, start:])

    @property
    def hessian_II(self) -> torch.Tensor | None:
        """Σ x xᵀ, float32 [I, I], None where it was not asked for."""
        if self.upper_II is not None:
            for start in range(_BLOCK, self.upper_II.shape[0], _BLOCK):
                rows = slice(start, start + _BLOCK)
                self.upper_II[rows, :start] = self.upper_II[:start, rows].T
        return self.upper_II


@contextmanager
def _bfloat16_products(exact: bool) -> Iterator[None]:
    """Let float32 products of numbers that are bfloat16 anyway use bfloat16 units, with float32 sums; twice as fast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse_cholesky(hessian_II: torch.Tensor, damping: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of a damped hessian (Frantar et al. 2022, section 3.3).

    A channel that was never active gets a diagonal of 1, which leaves its weights alone.

    Args:
        hessian_II: symmetric float32 [I, I].
        damping: fraction of the mean diagonal that is added to the diagonal.
        order: permutation of the channels to apply first, int64 [I].

    Returns:
        Float32 [I, I], its columns contiguous.

    Raises:
        NumericalError: NaN or Inf in the hessian, or not positive definite after damping.
    """
    if not finite(hessian_II):
        raise NumericalError("the hessian has NaN or Inf; the calibration activations have too")
    work = hessian_II.clone() if order is None else hessian_II[order.unsqueeze(1), order]
    diagonal = work.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    # Each step overwrites what it no longer needs. LAPACK wants columns contiguous; of another layout it takes copies.
    work = work.mT
    status = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, out=(work, status))
    if status.item() == 0:
        torch.cholesky_inverse(work, out=work)
        torch.linalg.cholesky_ex(work, upper=True, out=(work, status))
    if status.item() != 0:
        raise NumericalError(
            f"the hessian ({work.shape[0]} channels) is not positive definite with damping {damping:g}; "
            "use more calibration samples or a larger damping"
        )
    return work
