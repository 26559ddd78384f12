"""Elastic ranks: the space of sub-adapters, its named points, and one seeded draw per optimiser step.

A super-adapter of rank r_max holds every sub-adapter of a smaller rank in its first rows and columns (NLS, Munoz et
al. 2024a; SQFT section 2.2). Modules of one group always share a rank. A configuration is a plain dict {group: rank}.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqft.errors import InputError, Problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True)
class RankSpace:
    """The ranks that each group may take.

    Attributes:
        choices: ranks in descending order, the same for all groups.
        groups: group name to the names of its modules.
    """

    choices: tuple[int, ...]
    groups: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse ranks that are no ranks."""
        if not self.choices or min(self.choices) < 1:
            raise InputError(f"ranks are {list(self.choices)}; give at least one, each 1 or more")

    @property
    def max_rank(self) -> int:
        """The super-adapter's rank."""
        return max(self.choices)

    @property
    def elastic(self) -> bool:
        """Whether there is anything to choose."""
        return len(set(self.choices)) > 1

    def maximal(self) -> dict[str, int]:
        """Return the super-adapter itself."""
        return dict.fromkeys(self.groups, self.max_rank)

    def minimal(self) -> dict[str, int]:
        """Return the smallest sub-adapter."""
        return dict.fromkeys(self.groups, min(self.choices))

    def heuristic(self) -> dict[str, int]:
        """Return the median rank of every group (section 3.1); of an even count the larger of the middle two."""
        ordered = sorted(set(self.choices))
        return dict.fromkeys(self.groups, ordered[len(ordered) // 2])

    def draw(self, seed: int, step: int) -> dict[str, int]:
        """Return the configuration that optimiser step `step` trains: the same in every process and after a resume."""
        generator = random.Random(f"{seed}-{step}")  # noqa: S311 - a reproducible draw, not a secret
        choices = sorted(set(self.choices))
        return {group: generator.choice(choices) for group in self.groups}

    def check(self, ranks: Mapping[str, int], where: str) -> dict[str, int]:
        """Return `ranks` if it names each group once with a rank that the space has.

        Raises:
            InputError: every group that is missing, unknown or has another rank.
        """
        with Problems(where) as problems:
            for group in self.groups:
                if group not in ranks:
                    problems.add(f"group {group} has no rank")
                elif ranks[group] not in self.choices:
                    problems.add(f"group {group} has rank {ranks[group]!r}; the ranks are {sorted(self.choices)}")
            for group in ranks:
                if group not in self.groups:
                    problems.add(f"there is no group {group}; the groups are {', '.join(list(self.groups)[:4])}, ...")
        return dict(ranks)

    def per_module(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Return {module: rank} of a configuration {group: rank}."""
        return {module: ranks[group] for group, modules in self.groups.items() for module in modules}


def group_modules(modules: Iterable[str], choices: Iterable[int], rank_groups: Sequence[Sequence[str]]) -> RankSpace:
    """Return the rank space of adapted modules.

    Modules with the same parent whose last names stand together in `rank_groups` share a rank; every other is a group
    of its own.

    Args:
        modules: names of the adapted linears.
        choices: ranks that a group may take.
        rank_groups: last names of the linears of one layer that share a rank.
    """
    groups: dict[str, list[str]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        shared = next((group for group in rank_groups if last in group), None)
        groups.setdefault(name if shared is None else f"{parent}.{'+'.join(shared)}", []).append(name)
    return RankSpace(tuple(sorted(set(choices), reverse=True)), {g: tuple(m) for g, m in groups.items()})
