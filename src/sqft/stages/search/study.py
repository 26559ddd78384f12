"""The search itself: an Optuna study over the ranks of each group, in one file that processes share.

The model is loaded once and a configuration is switched in place: only the weights whose rank changed are made anew.
The study is Optuna's journal, `OUT.study`: a search that was killed goes on from it, and a second process that is
started with the same command, here or on another machine that sees the file, takes part. The hill climbing is a
function of its record (:mod:`sqft.core.climb`), so it ends the same however it was interrupted or shared; random and
nsga2 do so when one process at a time works on them.

A trial whose process died is not waited for: on this machine as soon as its process is gone, elsewhere when it has
taken three times as long as the slowest finished one.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import optuna
import psutil
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tqdm.auto import tqdm

from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights, switch_ranks
from sqft.artifact import key_of
from sqft.core.climb import Climb, Configuration, as_configuration, climb
from sqft.errors import InputError
from sqft.evaluation.harness import evaluate_examples
from sqft.locks import exclusive
from sqft.model.load import to_device
from sqft.model.opening import load_tokenizer

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from sqft.adapters.saved import SavedAdapter
    from sqft.core.ranks import RankSpace
    from sqft.data.tasks import Example, Task
    from sqft.recipe import SearchConfig

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_STALE_FACTOR = 3.0
_STALE_SECONDS = 60.0
# Draws of random and nsga2 for each configuration of the budget, at most: one that is drawn again costs no evaluation.
_DRAWS = 10
_WORKER = "worker"


def search(
    config: SearchConfig,
    adapter: SavedAdapter,
    space: RankSpace,
    base: Path,
    rows: Sequence[tuple[Task, Sequence[Example]]],
    out: Path,
    description: Mapping[str, Any],
    seed: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Evaluate configurations until the budget is used up, and return the record.

    Raises:
        InputError: the adapter has one rank, so there is nothing to choose.
    """
    if not space.elastic:
        raise InputError(
            f"adapter {adapter.path}: has the one rank {space.max_rank}, so there is nothing to search; train with "
            "several finetune.ranks, or use strategy maximal"
        )
    file = out.with_name(f"{out.name}.study")
    file.parent.mkdir(parents=True, exist_ok=True)
    study = open_study(file, key_of(description), pareto=config.strategy == "nsga2")
    sizes = _group_sizes(adapter, space)
    searcher = _Searcher(config, space, study, seed)
    done = len(searcher.scores())
    if done:
        logger.info("search: going on from %s with %d of %d configurations evaluated", file, done, config.budget)
    if not searcher.finished():
        _evaluate_all(searcher, adapter, base, rows, sizes, trust_remote_code)
    return searcher.record(rows, sizes)


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
    """Algorithm 1 as an Optuna sampler: the next configuration that the climb wants and nobody works on.

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
        """Return what the climb wants and no living process works on."""
        taken = {_configuration(self.space, trial) for trial in _running(study) if self._asked(trial)}
        return [configuration for configuration in self.climb(study).wanted if configuration not in taken]

    def _asked(self, trial: FrozenTrial) -> bool:
        """Tell whether a running trial has all its ranks; another process may be half-way through writing them."""
        return len(trial.params) == len(self.space.groups)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return one categorical rank a group."""
        return cast("dict[str, BaseDistribution]", distributions(self.space))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a wanted configuration; processes that ask at the same moment get different ones.

        With all wanted ones taken it is one of those again, and after the end the anchor: neither hurts.
        """
        state = self.climb(study)
        asking = sorted(t.number for t in _running(study) if not self._asked(t))
        place = asking.index(trial.number) if trial.number in asking else 0
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
    return {_configuration(space, trial): trial.values[0] for trial in trials}


def _configuration(space: RankSpace, trial: FrozenTrial) -> Configuration:
    return as_configuration(space, trial.params)


def _running(study: Study) -> list[FrozenTrial]:
    """Return the trials that a living process works on."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
    slowest = max((t.duration.total_seconds() for t in trials if t.duration is not None), default=0.0)
    patience = max(_STALE_SECONDS, _STALE_FACTOR * slowest)
    return [t for t in trials if t.state == TrialState.RUNNING and _alive(t, patience)]


def _alive(trial: FrozenTrial, patience: float) -> bool:
    host, _, rest = str(trial.user_attrs.get(_WORKER, "")).partition(":")
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


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid())}"


class _Searcher:
    """One process's part in a study: what to ask for, when to wait, when it is over."""

    def __init__(self, config: SearchConfig, space: RankSpace, study: Study, seed: int) -> None:
        self.config, self.space, self.study, self.seed = config, space, study, seed
        self.hill: HillClimbing | None = None
        if config.strategy == "hill_climbing":
            self.hill = HillClimbing(
                space, turns=config.turns, neighbours=config.neighbours, steps=config.steps, seed=seed
            )
            study.sampler = self.hill

    def scores(self) -> dict[Configuration, float]:
        return scores_of(self.study, self.space)

    def _complete(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def finished(self) -> bool:
        if self.hill is not None:
            state = self.hill.climb(self.study)
            return state.anchor is not None and not state.wanted
        scores = self.scores()
        enough = len(scores) >= self._wanted() or self._complete() >= _DRAWS * self.config.budget
        return enough and as_configuration(self.space, self.space.heuristic()) in scores

    def _wanted(self) -> int:
        """Return how many configurations random and nsga2 evaluate: the budget, or all that there are."""
        every: int = len(set(self.space.choices)) ** len(self.space.groups)
        return min(self.config.budget, every)

    def _ensure_heuristic(self) -> None:
        """Ask for the heuristic first, and again where the process that had it is gone."""
        heuristic = self.space.heuristic()
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        asked = [trial.system_attrs.get("fixed_params") for trial in waiting]
        asked += [trial.params for trial in _running(self.study)]
        if heuristic not in asked and as_configuration(self.space, heuristic) not in self.scores():
            self.study.enqueue_trial(heuristic)

    def ask(self) -> optuna.trial.Trial | None:
        """Return the next trial; None when the search is over. Waits while all that is left is being evaluated."""
        while not self.finished():
            if self.hill is not None:
                ready = bool(self.hill.free(self.study))
            else:
                self._ensure_heuristic()
                running = _running(self.study)
                begun = self._complete() + len(running)
                waiting = bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
                groups = self.space.groups
                taken = {*self.scores(), *(tuple(trial.params.get(group) for group in groups) for trial in running)}
                ready = waiting or (len(taken) < self._wanted() and begun < _DRAWS * self.config.budget)
                self.study.sampler = self._sampler(begun)
            if ready:
                trial = self.study.ask(cast("dict[str, BaseDistribution]", distributions(self.space)))
                trial.set_user_attr(_WORKER, _worker())
                return trial
            time.sleep(_POLL_SECONDS)
        return None

    def _sampler(self, begun: int) -> optuna.samplers.BaseSampler:
        """Return the strategy's sampler, seeded by how far the study is: a resumed one draws what it would have."""
        seed = (self.seed * 1_000_003 + begun) % 2**32
        if self.config.strategy == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=self.config.neighbours, seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def record(self, rows: Sequence[tuple[Task, Sequence[Example]]], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return what `search.json` holds."""
        turn_of: dict[Configuration, int] = {}
        if self.hill is not None:
            for turn, (_, sampled) in enumerate(self.hill.climb(self.study).turns, 1):
                turn_of.update(dict.fromkeys(sampled, turn))
        trials: dict[Configuration, dict[str, Any]] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            configuration = _configuration(self.space, trial)
            assert trial.duration is not None
            trials.setdefault(
                configuration,
                {
                    "ranks": dict(trial.params),
                    "accuracy": trial.values[0],
                    "parameters": parameters(trial.params, sizes),
                    "seconds": round(trial.duration.total_seconds(), 2),
                    "turn": turn_of.get(configuration, 0),
                    "tasks": trial.user_attrs.get("tasks", {}),
                },
            )
        heuristic = trials[as_configuration(self.space, self.space.heuristic())]
        if self.hill is not None:
            chosen = trials[cast("Configuration", self.hill.climb(self.study).anchor)]
        else:
            # Of equally accurate ones the smallest, then the first.
            chosen = min(trials.values(), key=lambda trial: (-trial["accuracy"], trial["parameters"]))
        return {
            "strategy": self.config.strategy,
            "metric": "mean accuracy over the tasks' validation rows",
            "rows": {task.name: len(examples) for task, examples in rows},
            "chosen": chosen,
            "heuristic": heuristic,
            "front": pareto_front(list(trials.values())),
            "trials": list(trials.values()),
        }


def pareto_front(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the trials that no other beats in accuracy and size at once, by falling accuracy."""
    front: list[dict[str, Any]] = []
    for trial in sorted(trials, key=lambda trial: (-trial["accuracy"], trial["parameters"])):
        if not front or trial["parameters"] < front[-1]["parameters"]:
            front.append(trial)
    return front


def _group_sizes(adapter: SavedAdapter, space: RankSpace) -> dict[str, int]:
    """Return how many parameters one rank costs in each group."""
    return {
        group: sum(adapter.modules[m].lora_A.shape[1] + adapter.modules[m].lora_B.shape[0] for m in modules)
        for group, modules in space.groups.items()
    }


def parameters(ranks: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return the number of an adapter's parameters."""
    return sum(rank * sizes[group] for group, rank in ranks.items())


def _evaluate_all(
    searcher: _Searcher,
    adapter: SavedAdapter,
    base: Path,
    rows: Sequence[tuple[Task, Sequence[Example]]],
    sizes: Mapping[str, int],
    trust_remote_code: bool,
) -> None:
    config, study = searcher.config, searcher.study
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    model = to_device(load_model(base, adapter.path, elastic=True, trust_remote_code=trust_remote_code))
    bar = tqdm(total=config.budget, desc="searching", unit="configuration", disable=None, leave=False)
    with cached_weights(model), bar:
        while (trial := searcher.ask()) is not None:
            bar.update(max(0, len(searcher.scores()) - bar.n))
            known = searcher.scores().get(as_configuration(searcher.space, trial.params))
            tasks: dict[str, float] = {}
            try:
                if known is None:
                    switch_ranks(model, searcher.space.per_module(trial.params))
                    tasks = {
                        task.name: evaluate_examples(model, tokenizer, task, examples, config.batch).value
                        for task, examples in rows
                    }
            except BaseException:
                with suppress(Exception):
                    study.tell(trial, state=TrialState.FAIL)
                raise
            accuracy = sum(tasks.values()) / len(tasks) if known is None else known
            trial.set_user_attr("tasks", tasks)
            size = parameters(trial.params, sizes)
            study.tell(trial, [accuracy, float(size)] if config.strategy == "nsga2" else accuracy)
            logger.info(
                "configuration %d of %d: %.4f, %d parameters", len(searcher.scores()), config.budget, accuracy, size
            )
