"""Extract: choose the ranks of a sub-adapter, by name or by a search, and write it as a PEFT adapter.

The named points of the space (heuristic, maximal, minimal) and a file of ranks need no model: the adapter's factors are
sliced on disk. The searching strategies evaluate configurations on validation rows (:mod:`sqft.stages.extract.search`)
and leave beside the ranks a record of all of them, `sqft/search.json`: {strategy, metric, rows, trials: [{ranks,
accuracy, parameters, seconds, turn}], chosen, heuristic, front}.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sqft.adapters.saved import SavedAdapter, write_sub_adapter
from sqft.artifact import MANIFEST, Artifact
from sqft.data.tasks import judged_digest
from sqft.disk import read_json, write_json
from sqft.errors import InputError
from sqft.stage import Stage

if TYPE_CHECKING:
    from sqft.artifact import Draft
    from sqft.context import Context
    from sqft.core.ranks import RankSpace
    from sqft.data.tasks import Example, Task
    from sqft.recipe import SearchConfig

logger = logging.getLogger(__name__)

RECORD = Path("sqft") / "search.json"
Rows: TypeAlias = "Sequence[tuple[Task, Sequence[Example]]]"


@dataclass(frozen=True)
class _Ready:
    """The super-adapter, the ranks that were chosen, and of a search its record."""

    saved: SavedAdapter
    space: RankSpace
    ranks: dict[str, int]
    record: dict[str, Any] | None


def run(
    config: SearchConfig,
    adapter: Path,
    out: Path,
    context: Context,
    *,
    base: Path | None = None,
    rows: Rows = (),
) -> Artifact:
    """Choose a sub-adapter of a super-adapter and extract it.

    Args:
        config: which point of the rank space, or how to search for one.
        adapter: the super-adapter's folder.
        out: the folder to make; the study of a search is the file `OUT.study` beside it.
        context: its seed is that of what a search samples.
        base: the base model's folder; only a search needs it.
        rows: validation rows of each task; only a search needs them. A table must report other rows.

    Raises:
        InputError: the adapter, the file of ranks, the base or the rows cannot be used.
    """
    rows = [(task, examples[: config.samples]) for task, examples in rows]
    settings, inputs = _described(config, adapter, base, rows)
    stage = Stage.of("search", out, settings, inputs, context.seed)

    def ready() -> _Ready:
        saved = SavedAdapter.open(adapter)
        space = saved.rank_space()
        if not config.searches:
            return _Ready(saved, space, _named(config, space), None)
        from sqft.stages.extract.search import search

        assert base is not None
        record = search(config, saved, space, base, rows, stage, context)
        return _Ready(saved, space, record["chosen"]["ranks"], record)

    return stage.make(ready, partial(_write, config), in_turn=config.searches)


def _described(
    config: SearchConfig, adapter: Path, base: Path | None, rows: Rows
) -> tuple[dict[str, Any], dict[str, str | Path]]:
    """Return the settings and inputs on which the choice depends.

    Raises:
        InputError: one that the strategy needs is not given.
    """
    inputs: dict[str, str | Path] = {"adapter": adapter}
    if config.strategy == "file":
        if config.ranks_file is None:
            raise InputError("search.strategy is 'file', but search.ranks_file is not given")
        if not Path(config.ranks_file).is_file():
            raise InputError(f"search.ranks_file {config.ranks_file}: no such file; give a JSON object {{group: rank}}")
        inputs["ranks"] = config.ranks_file
    if not config.searches:
        return {"strategy": config.strategy}, inputs
    if base is None or not any(examples for _, examples in rows):
        raise InputError(
            f"search.strategy {config.strategy} evaluates configurations: it needs the base model and validation "
            "rows; use sqft search with --base and --task, or a strategy that needs neither, such as heuristic"
        )
    settings = config.model_dump(mode="json", exclude={"ranks_file", "batch"})
    return settings | {"data_digest": [judged_digest(task, part) for task, part in rows]}, inputs | {"base": base}


def _write(config: SearchConfig, ready: _Ready, draft: Draft) -> dict[str, Any]:
    """Write the sub-adapter, its ranks and how they were found; return what the manifest says of them."""
    saved, ranks, record = ready.saved, ready.ranks, ready.record
    write_sub_adapter(saved, ready.space.per_module(ranks), draft.path)
    values = {
        "strategy": config.strategy,
        "ranks": ranks,
        "choices": list(ready.space.choices),
        "groups": {group: list(modules) for group, modules in ready.space.groups.items()},
    }
    write_json(draft.path / "sqft" / "ranks.json", values)
    trained = Artifact.open(saved.path).manifest["result"] if (saved.path / MANIFEST).is_file() else {}
    counts = Counter(ranks.values())
    result: dict[str, Any] = {
        "base_identity": trained.get("base_identity"),
        "start": trained.get("start"),
        "kind": saved.kind,
        "groups_per_rank": {str(rank): counts[rank] for rank in sorted(counts)},
    }
    if record is not None:
        write_json(draft.path / RECORD, record)
        result["evaluated"] = len(record["trials"])
        result["accuracy"] = record["chosen"]["accuracy"]
        result["heuristic_accuracy"] = record["heuristic"]["accuracy"]
    logger.info("extracted the %s sub-adapter: %s", config.strategy, dict(sorted(counts.items())))
    return result


def _named(config: SearchConfig, space: RankSpace) -> dict[str, int]:
    """Return the configuration that needs no evaluation."""
    if config.strategy == "heuristic":
        return space.heuristic()
    if config.strategy == "maximal":
        return space.maximal()
    if config.strategy == "minimal":
        return space.minimal()
    assert config.ranks_file is not None
    return space.check(read_json(Path(config.ranks_file)), f"search.ranks_file {config.ranks_file}")
