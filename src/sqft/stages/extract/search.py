"""The search itself: an Optuna study over the ranks of each group (:mod:`sqft.stages.extract.study`).

The model is loaded once and a configuration is switched in place: only the weights whose rank changed are made anew.
The study is Optuna's journal, `OUT.study`: a search that was killed continues from it, and a second process that is
started with the same command, here or on another machine that sees the file, takes part. The hill climbing is a
function of its record (:mod:`sqft.core.climb`), so it ends the same however it was interrupted or shared; random and
nsga2 do so when one process at a time works on them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import optuna
from optuna.trial import TrialState
from tqdm.auto import tqdm

from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights, switch_ranks
from sqft.artifact import key_of
from sqft.core.climb import Configuration, as_configuration
from sqft.device import place
from sqft.errors import InputError
from sqft.evaluation.harness import evaluate_examples
from sqft.stages.extract.study import (
    WORKER,
    HillClimbing,
    configuration_of,
    distributions,
    open_study,
    running,
    scores_of,
    worker,
)

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

    from sqft.adapters.saved import SavedAdapter
    from sqft.context import Context
    from sqft.core.ranks import RankSpace
    from sqft.data.tasks import Example, Task
    from sqft.recipe import SearchConfig
    from sqft.stage import Stage

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
# Draws of random and nsga2 for each configuration of the budget, at most: one that is drawn again costs no evaluation.
_DRAWS = 10
Rows: TypeAlias = "Sequence[tuple[Task, Sequence[Example]]]"


def search(
    config: SearchConfig,
    adapter: SavedAdapter,
    space: RankSpace,
    base: Path,
    rows: Rows,
    stage: Stage,
    context: Context,
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
    file = stage.out.with_name(f"{stage.out.name}.study")
    file.parent.mkdir(parents=True, exist_ok=True)
    study = open_study(file, key_of(stage.description), pareto=config.strategy == "nsga2")
    sizes = _group_sizes(adapter, space)
    searcher = _Searcher(config, space, study, context.seed)
    done = len(searcher.scores())
    if done:
        logger.info("search: going on from %s with %d of %d configurations evaluated", file, done, config.budget)
    if not searcher.finished():
        _evaluate_all(searcher, adapter, base, rows, sizes, context)
    return searcher.record(rows, sizes)


class _Searcher:
    """One process's part in a study: the next trial, when to wait, when it is over."""

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
        asked += [trial.params for trial in running(self.study)]
        if heuristic not in asked and as_configuration(self.space, heuristic) not in self.scores():
            self.study.enqueue_trial(heuristic)

    def ask(self) -> optuna.trial.Trial | None:
        """Return the next trial; None when the search is over. Waits while all that is left is being evaluated."""
        while not self.finished():
            if self.hill is not None:
                ready = bool(self.hill.free(self.study))
            else:
                self._ensure_heuristic()
                current = running(self.study)
                begun = self._complete() + len(current)
                waiting = bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
                groups = self.space.groups
                taken = {*self.scores(), *(tuple(trial.params.get(group) for group in groups) for trial in current)}
                ready = waiting or (len(taken) < self._wanted() and begun < _DRAWS * self.config.budget)
                self.study.sampler = self._sampler(begun)
            if ready:
                trial = self.study.ask(cast("dict[str, BaseDistribution]", distributions(self.space)))
                trial.set_user_attr(WORKER, worker())
                return trial
            time.sleep(_POLL_SECONDS)
        return None

    def _sampler(self, begun: int) -> optuna.samplers.BaseSampler:
        """Return the strategy's sampler, seeded by how far the study is: a resumed one draws what it would have."""
        seed = (self.seed * 1_000_003 + begun) % 2**32
        if self.config.strategy == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=self.config.neighbours, seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def record(self, rows: Rows, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return what `search.json` holds."""
        turn_of: dict[Configuration, int] = {}
        if self.hill is not None:
            for turn, (_, sampled) in enumerate(self.hill.climb(self.study).turns, 1):
                turn_of.update(dict.fromkeys(sampled, turn))
        trials: dict[Configuration, dict[str, Any]] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            configuration = configuration_of(self.space, trial)
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
    rows: Rows,
    sizes: Mapping[str, int],
    context: Context,
) -> None:
    """Evaluate configurations until none is wanted, with the model loaded once."""
    config, study = searcher.config, searcher.study
    tokenizer = context.tokenizer(base)
    model = load_model(base, adapter.path, elastic=True, trust_remote_code=context.trust_remote_code)
    place(model, context.device, "search on a card with more memory")
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
