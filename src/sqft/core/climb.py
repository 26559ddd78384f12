"""Hill climbing over rank configurations (SQFT, Algorithm 1), as a function of what has been evaluated.

The state of a search is nothing but its evaluated configurations: :func:`climb` replays Algorithm 1 over them and says
which are wanted next. A search that was killed, or that several processes share, therefore goes on from its record
alone, and ends with the same configuration however it was interrupted or shared out.

Where the paper is silent:
- an S-step neighbour differs from the anchor by at most S single steps, each to the next larger or smaller rank of one
  group.
- the heuristic configuration is evaluated first, so that a neighbour must beat it to replace it.
- of neighbours with equal scores the first sampled is the turn's best.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqft.core.ranks import RankSpace

Configuration = tuple[int, ...]
# Draws in a row that give nothing new before the neighbourhood counts as visited.
_PATIENCE = 1000


@dataclass(frozen=True)
class Climb:
    """Where a hill climbing stands.

    Attributes:
        anchor: the best configuration so far; None until the start is evaluated.
        wanted: configurations to evaluate before the climb can go on, in order; none when it has ended.
        turns: for each turn begun, its anchor and the neighbours sampled.
    """

    anchor: Configuration | None
    wanted: tuple[Configuration, ...]
    turns: tuple[tuple[Configuration, tuple[Configuration, ...]], ...]


def as_configuration(space: RankSpace, ranks: Mapping[str, int]) -> Configuration:
    """Return {group: rank} as a tuple in the order of the space's groups."""
    return tuple(ranks[group] for group in space.groups)


def climb(
    space: RankSpace,
    scores: Mapping[Configuration, float],
    *,
    turns: int,
    neighbours: int,
    steps: int,
    seed: int,
) -> Climb:
    """Replay Algorithm 1 as far as the evaluated configurations carry it.

    Args:
        space: the groups and their ranks.
        scores: score (higher is better) of every configuration evaluated so far.
        turns: T.
        neighbours: N, sampled a turn.
        steps: S.
        seed: of the sampling; turn t draws from (seed, t).
    """
    anchor = as_configuration(space, space.heuristic())
    if anchor not in scores:
        return Climb(None, (anchor,), ())
    visited = {anchor}
    history: list[tuple[Configuration, tuple[Configuration, ...]]] = []
    for turn in range(turns):
        sampled = sample_neighbours(space, anchor, neighbours, steps, visited, random.Random(f"{seed}-{turn}"))  # noqa: S311
        if not sampled:
            break
        visited.update(sampled)
        history.append((anchor, sampled))
        wanted = tuple(configuration for configuration in sampled if configuration not in scores)
        if wanted:
            return Climb(anchor, wanted, tuple(history))
        best = max(sampled, key=lambda configuration: scores[configuration])
        if scores[best] > scores[anchor]:
            anchor = best
    return Climb(anchor, (), tuple(history))


def sample_neighbours(
    space: RankSpace,
    anchor: Configuration,
    count: int,
    steps: int,
    visited: set[Configuration],
    generator: random.Random,
) -> tuple[Configuration, ...]:
    """Return up to `count` different unvisited configurations at most `steps` single steps from the anchor.

    The number of steps is drawn first, from 1 to `steps`: uniform over configurations it would nearly always be the
    largest. Fewer come back when the neighbourhood is used up.
    """
    choices = sorted(set(space.choices))
    start = [choices.index(rank) for rank in anchor]
    found: list[Configuration] = []
    failures = 0
    while len(found) < count and failures < _PATIENCE:
        place = list(start)
        for _ in range(generator.randint(1, steps)):
            moves = [(i, d) for i, at in enumerate(place) for d in (-1, 1) if 0 <= at + d < len(choices)]
            if not moves:
                break
            group, direction = generator.choice(moves)
            place[group] += direction
        configuration = tuple(choices[at] for at in place)
        if configuration == anchor or configuration in visited or configuration in found:
            failures += 1
            continue
        failures = 0
        found.append(configuration)
    return tuple(found)
