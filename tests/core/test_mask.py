"""Mask selection against naive loops and the reference's stable sort; packing against numpy."""

import numpy as np
import pytest
import torch

from sqft.core.mask import conforms, finite, mask_from_score, pack_mask, unpack_mask
from sqft.errors import InputError, NumericalError


def naive_rows(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The lowest int(I * s) of each row, first index first among equals."""
    mask = torch.ones_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        order = sorted(range(score.shape[1]), key=lambda column: (float(score[row, column]), column))
        for column in order[: int(score.shape[1] * sparsity)]:
            mask[row, column] = False
    return mask


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.51, 0.9])
@pytest.mark.parametrize("ties", [False, True])
def test_unstructured_equals_a_naive_loop(sparsity: float, ties: bool) -> None:
    score = torch.rand(7, 33, generator=torch.Generator().manual_seed(0))
    if ties:
        score = (score * 4).floor()
    assert torch.equal(mask_from_score(score, sparsity), naive_rows(score, sparsity))


def test_unstructured_equals_the_reference_rule() -> None:
    # locuslab/wanda lib/prune.py: a stable sort, then scatter of the first int(columns * ratio) indices.
    score = (torch.rand(64, 96, generator=torch.Generator().manual_seed(1)) * 50).round()
    pruned = torch.zeros_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=-1, stable=True)[1][:, : int(score.shape[1] * 0.5)]
    pruned.scatter_(1, order, True)
    assert torch.equal(mask_from_score(score, 0.5), ~pruned)


@pytest.mark.parametrize(("keep_n", "group_m"), [(2, 4), (4, 8), (1, 4)])
def test_structured_keeps_the_largest_of_every_group(keep_n: int, group_m: int) -> None:
    score = torch.rand(5, 32, generator=torch.Generator().manual_seed(2))
    mask = mask_from_score(score, 0.0, (keep_n, group_m))
    for row in range(5):
        for start in range(0, 32, group_m):
            group = score[row, start : start + group_m]
            kept = set(mask[row, start : start + group_m].nonzero().flatten().tolist())
            assert kept == set(group.topk(keep_n).indices.tolist())
    assert conforms(mask, keep_n, group_m)
    assert not conforms(torch.ones_like(mask), keep_n, group_m)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="2:4 does not divide rows of 30"):
        mask_from_score(torch.rand(2, 30), 0.5, (2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_sees_one_bad_value_anywhere(dtype: torch.dtype, bad: float) -> None:
    good = torch.randn(37, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert finite(good)
    for row, column in [(0, 0), (20, 3), (36, 40)]:
        broken = good.clone()
        broken[row, column] = bad
        assert not finite(broken)
        assert not finite(broken.T)
    assert finite(torch.empty(0, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(bad: float) -> None:
    score = torch.rand(2, 8)
    score[1, 3] = bad
    with pytest.raises(NumericalError, match="NaN or Inf"):
        mask_from_score(score, 0.5)


@pytest.mark.parametrize("shape", [(3, 8), (5, 13), (2, 3, 17)])
def test_packing_is_numpys_little_endian_and_comes_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    packed = pack_mask(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack_mask(packed, shape[-1]), mask)
