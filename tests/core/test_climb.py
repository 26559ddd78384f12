"""Algorithm 1 replayed from its record, against the algorithm written as its loop."""

from __future__ import annotations

import random

import pytest

from sqft.core.climb import as_configuration, climb, sample_neighbours
from sqft.core.ranks import RankSpace

SPACE = RankSpace((12, 8, 4), {f"g{i}": (f"m{i}",) for i in range(6)})
SETTINGS = {"turns": 4, "neighbours": 3, "steps": 2, "seed": 5}


def score(configuration: tuple[int, ...]) -> float:
    """A landscape with ties: many configurations share a score, as on a hundred validation rows."""
    return round(sum((i + 1) * rank for i, rank in enumerate(configuration)) % 37 / 10)


def algorithm_1() -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The paper's loop: anchor, visited set, best neighbour replaces the anchor if it is better."""
    anchor = as_configuration(SPACE, SPACE.heuristic())
    order, visited = [anchor], {anchor}
    best = score(anchor)
    for turn in range(SETTINGS["turns"]):
        draw = random.Random(f"{SETTINGS['seed']}-{turn}")
        neighbours = sample_neighbours(SPACE, anchor, SETTINGS["neighbours"], SETTINGS["steps"], visited, draw)
        visited |= set(neighbours)
        order += neighbours
        for configuration in neighbours:
            if score(configuration) > best:
                best, anchor = score(configuration), configuration
    return anchor, order


def test_the_replay_ends_where_the_loop_ends_and_tries_nothing_twice() -> None:
    anchor, order = algorithm_1()
    scores: dict[tuple[int, ...], float] = {}
    tried = []
    while wanted := climb(SPACE, scores, **SETTINGS).wanted:
        tried.append(wanted[0])
        scores[wanted[0]] = score(wanted[0])
    assert tried == order
    assert len(set(tried)) == len(tried) == 1 + SETTINGS["turns"] * SETTINGS["neighbours"]
    assert climb(SPACE, scores, **SETTINGS).anchor == anchor
    assert anchor != order[0]  # it climbed


@pytest.mark.parametrize("shuffle", range(5))
def test_the_order_of_evaluation_within_a_turn_does_not_matter(shuffle: int) -> None:
    draw = random.Random(shuffle)
    scores: dict[tuple[int, ...], float] = {}
    while wanted := climb(SPACE, scores, **SETTINGS).wanted:
        chosen = draw.choice(wanted)
        scores[chosen] = score(chosen)
    assert climb(SPACE, scores, **SETTINGS).anchor == algorithm_1()[0]


def test_neighbours_are_at_most_s_single_steps_away_and_new() -> None:
    anchor = as_configuration(SPACE, SPACE.heuristic())
    ladder = sorted(SPACE.choices)
    seen: set[int] = set()
    visited = {anchor}
    for seed in range(30):
        found = sample_neighbours(SPACE, anchor, 4, 3, visited, random.Random(seed))
        assert len(set(found)) == 4
        assert not set(found) & visited
        visited |= set(found)
        for configuration in found:
            steps = sum(abs(ladder.index(a) - ladder.index(b)) for a, b in zip(anchor, configuration, strict=True))
            assert 1 <= steps <= 3
            seen.add(steps)
    assert seen == {1, 2, 3}


def test_a_neighbourhood_that_is_used_up_gives_what_it_has() -> None:
    small = RankSpace((8, 4), {"g": ("m",)})
    assert sample_neighbours(small, (8,), 5, 1, {(8,)}, random.Random(0)) == ((4,),)
    assert sample_neighbours(small, (8,), 5, 1, {(8,), (4,)}, random.Random(0)) == ()
    state = climb(small, {(8,): 0.5, (4,): 0.4}, turns=9, neighbours=3, steps=1, seed=0)
    assert (state.anchor, state.wanted, len(state.turns)) == ((8,), (), 1)


def test_an_equal_neighbour_does_not_replace_the_anchor() -> None:
    small = RankSpace((8, 4), {"g": ("m",)})
    assert climb(small, {(8,): 0.5, (4,): 0.5}, turns=2, neighbours=1, steps=1, seed=0).anchor == (8,)
    assert climb(small, {(8,): 0.5, (4,): 0.6}, turns=2, neighbours=1, steps=1, seed=0).anchor == (4,)
