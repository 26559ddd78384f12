"""The study of a search: an Optuna journal in one file that processes share, and Algorithm 1 as its sampler.

A trial whose process died is not waited for: on this machine as soon as its process is gone, elsewhere when it has
taken three times as long as the slowest finished one.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import optuna
import psutil
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sqft.core.climb import Climb, Configuration, as_configuration, climb
from sqft.errors import InputError
from sqft.locks import exclusive

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from sqft.core.ranks import RankSpace

_STALE_FACTOR = 3.0
_STALE_SECONDS = 60.0
WORKER = "worker"


def open_study(file: Path, name: str, *, pareto: bool) -> Study:
    """Return the study of that name in a journal file, made if it is not there.

    It is an ordinary Optuna study: `optuna-dashboard OUT.study` shows it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file), cast("Any", _JournalLock(file)))),
        study_name=name,
        load_if_exists=True,
        directions=["maximize", "minimize"] if pareto else ["maximize"],
    )


class _JournalLock:
    """A lock that the kernel releases with its process; Optuna's own stands for half a minute after a kill.

    Whoever takes it cuts off the half line that a process killed while it wrote may have left: the next line would be
    joined to it, and the journal lost.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._held = journal, ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(exclusive(self._journal))
        with open(self._journal, "r+b") as stream:
            content = stream.read()
            if content and not content.endswith(b"\n"):
                stream.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._held.close()


class HillClimbing(optuna.samplers.BaseSampler):
    """Algorithm 1 as an Optuna sampler: the next configuration that the climb wants and no process evaluates.

    >>> study = optuna.create_study(sampler=HillClimbing(space, turns=5, neighbours=8, steps=8))  # doctest: +SKIP
    """

    def __init__(self, space: RankSpace, *, turns: int, neighbours: int, steps: int, seed: int = 0) -> None:
        """Take the rank space and T, N, S of Algorithm 1."""
        self.space, self.turns, self.neighbours, self.steps, self.seed = space, turns, neighbours, steps, seed

    def climb(self, study: Study) -> Climb:
        """Return where the climb of a study stands."""
        return climb(
            self.space,
            scores_of(study, self.space),
            turns=self.turns,
            neighbours=self.neighbours,
            steps=self.steps,
            seed=self.seed,
        )

    def free(self, study: Study) -> list[Configuration]:
        """Return the configurations that the climb wants and no living process evaluates."""
        taken = {configuration_of(self.space, trial) for trial in running(study) if self._has_ranks(trial)}
        return [configuration for configuration in self.climb(study).wanted if configuration not in taken]

    def _has_ranks(self, trial: FrozenTrial) -> bool:
        """Return whether a running trial has all its ranks; another process may still be writing them."""
        return len(trial.params) == len(self.space.groups)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return one categorical rank a group."""
        return cast("dict[str, BaseDistribution]", distributions(self.space))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a wanted configuration; processes that call this at the same moment get different ones.

        When all wanted ones are taken it is one of those again, and after the end the anchor: neither does harm.
        """
        state = self.climb(study)
        unset = sorted(t.number for t in running(study) if not self._has_ranks(t))
        place = unset.index(trial.number) if trial.number in unset else 0
        open_ = self.free(study) or list(state.wanted) or [cast("Configuration", state.anchor)]
        return dict(zip(self.space.groups, open_[place % len(open_)], strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that is no group of the space."""
        raise InputError(f"hill climbing knows the ranks of {len(self.space.groups)} groups, and not {param_name!r}")


def distributions(space: RankSpace) -> dict[str, CategoricalDistribution]:
    """Return the search space as Optuna knows it."""
    choices = sorted(set(space.choices))
    return {group: CategoricalDistribution(choices) for group in space.groups}


def scores_of(study: Study, space: RankSpace) -> dict[Configuration, float]:
    """Return the accuracy of every configuration that a study has evaluated, in their order."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {configuration_of(space, trial): trial.values[0] for trial in trials}


def configuration_of(space: RankSpace, trial: FrozenTrial) -> Configuration:
    """Return the configuration that a trial evaluates."""
    return as_configuration(space, trial.params)


def running(study: Study) -> list[FrozenTrial]:
    """Return the trials that a living process evaluates."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
    slowest = max((t.duration.total_seconds() for t in trials if t.duration is not None), default=0.0)
    patience = max(_STALE_SECONDS, _STALE_FACTOR * slowest)
    return [t for t in trials if t.state == TrialState.RUNNING and _alive(t, patience)]


def _alive(trial: FrozenTrial, patience: float) -> bool:
    host, _, rest = str(trial.user_attrs.get(WORKER, "")).partition(":")
    if host == socket.gethostname():
        process, _, born = rest.partition(":")
        return _born(int(process)) == born
    started = trial.datetime_start
    return started is not None and (datetime.now() - started).total_seconds() < patience


def _born(process: int) -> str | None:
    """Return when a process began, None if there is none; a number alone may belong to another one by now."""
    try:
        return str(psutil.Process(process).create_time())
    except psutil.NoSuchProcess:
        return None


def worker() -> str:
    """Return what identifies this process among all that share a study."""
    return f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid())}"
