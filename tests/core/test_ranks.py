"""The rank space: its named points by hand, and draws that depend on (seed, step) alone."""

import pytest

from sqft.core.ranks import RankSpace
from sqft.errors import InputError

SPACE = RankSpace((32, 24, 16), {"a": ("m.q", "m.k"), "b": ("m.up",)})


@pytest.mark.parametrize(("choices", "median"), [((32, 24, 16), 24), ((8,), 8), ((4, 2), 4), ((8, 6, 4, 2), 6)])
def test_heuristic_is_the_median_the_larger_of_the_middle_two(choices: tuple[int, ...], median: int) -> None:
    assert set(RankSpace(choices, {"a": ("m",)}).heuristic().values()) == {median}


def test_named_points() -> None:
    assert SPACE.maximal() == {"a": 32, "b": 32}
    assert SPACE.minimal() == {"a": 16, "b": 16}
    assert SPACE.per_module(SPACE.maximal()) == {"m.q": 32, "m.k": 32, "m.up": 32}


def test_draws_depend_on_seed_and_step_alone_and_reach_everything() -> None:
    assert SPACE.draw(0, 5) == SPACE.draw(0, 5)
    draws = [SPACE.draw(0, step) for step in range(60)]
    assert {d["a"] for d in draws} == {d["b"] for d in draws} == {32, 24, 16}
    assert draws != [SPACE.draw(1, step) for step in range(60)]
    assert any(d["a"] != d["b"] for d in draws)


def test_every_wrong_rank_is_reported_at_once() -> None:
    with pytest.raises(InputError, match=r"3 problems") as error:
        SPACE.check({"a": 17, "c": 16}, "ranks.json")
    assert "group a has rank 17" in str(error.value)
    assert "group b has no rank" in str(error.value)
    assert "no group c" in str(error.value)


@pytest.mark.parametrize("choices", [(), (0, 4), (-1,)])
def test_no_ranks_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="give at least one, each 1 or more"):
        RankSpace(choices, {})
