"""Statistics against plain sums in double precision; the factor against torch's own inverse."""

from __future__ import annotations

import pytest
import torch

from sqft.core.statistics import Statistics, inverse_cholesky


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 384, 900])
def test_the_hessian_is_the_sum_of_outer_products(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Statistics.empty(columns, hessian=True)
    plain = Statistics.empty(columns, hessian=False)
    for part in x.split(17):
        found.add(part)
        plain.add(part)
    expected = x.double().T @ x.double()
    assert found.tokens == plain.tokens == 40
    for _ in range(2):  # reading it twice changes nothing
        assert found.hessian_II is not None
        assert (found.hessian_II - expected).abs().max() < 1e-5 * expected.diagonal().max()
        assert torch.equal(found.hessian_II, found.hessian_II.T)
    assert torch.allclose(found.squared_sum_I, plain.squared_sum_I, rtol=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    hessian[4], hessian[:, 4] = 0, 0  # a channel that was never active
    before = hessian.clone()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = inverse_cholesky(hessian, 0.01, order)
    damped = hessian.double()[order][:, order]
    damped.diagonal()[damped.diagonal() == 0] = 1
    damped += 0.01 * damped.diagonal().mean() * torch.eye(30)
    assert torch.allclose(found.triu().double(), torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), atol=1e-5)
    assert torch.equal(hessian, before)
