"""Search: choose a sub-adapter and write it as a PEFT adapter with its own ranks.

The named points of the space (heuristic, maximal, minimal) and a file of ranks need no model: the adapter's factors are
sliced on disk. The searching strategies evaluate configurations on validation rows (:mod:`sqft.stages.search.study`)
and leave beside the ranks a record of all of them, `sqft/search.json`: {strategy, metric, rows, trials: [{ranks,
accuracy, parameters, seconds, turn}], chosen, heuristic, front}.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.adapters.saved import SavedAdapter, write_sub_adapter
from sqft.artifact import Artifact, describe, finished, writing
from sqft.data.tasks import judged_digest
from sqft.disk import read_json, write_json
from sqft.errors import InputError
from sqft.locks import exclusive

if TYPE_CHECKING:
    from sqft.core.ranks import RankSpace
    from sqft.data.tasks import Example, Task
    from sqft.recipe import SearchConfig

logger = logging.getLogger(__name__)

RECORD = Path("sqft") / "search.json"


def run(
    config: SearchConfig,
    adapter: Path,
    out: Path,
    *,
    seed: int = 0,
    base: Path | None = None,
    rows: Sequence[tuple[Task, Sequence[Example]]] = (),
    trust_remote_code: bool = False,
) -> Artifact:
    """Choose a sub-adapter of a super-adapter and extract it.

    Args:
        config: which point of the rank space, or how to search for one.
        adapter: the super-adapter's folder.
        out: the folder to make; the study of a search is the file `OUT.study` beside it.
        seed: of what is sampled.
        base: the base model's folder; searching alone needs it.
        rows: validation rows of each task; searching alone needs them. A table must report other rows.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the adapter, the file of ranks, the base or the rows cannot be used.
    """
    inputs: dict[str, str | Path] = {"adapter": adapter}
    if config.strategy == "file":
        if config.ranks_file is None:
            raise InputError("search.strategy is 'file', but search.ranks_file is not given")
        if not Path(config.ranks_file).is_file():
            raise InputError(f"search.ranks_file {config.ranks_file}: no such file; give a JSON object {{group: rank}}")
        inputs["ranks"] = config.ranks_file
    settings: dict[str, Any] = {"strategy": config.strategy}
    if config.searches:
        if base is None or not any(examples for _, examples in rows):
            raise InputError(
                f"search.strategy {config.strategy} evaluates configurations: it needs the base model and validation "
                "rows; use sqft search with --base and --task, or a strategy that needs neither, such as heuristic"
            )
        inputs["base"] = base
        rows = [(task, examples[: config.samples]) for task, examples in rows]
        settings = config.model_dump(mode="json", exclude={"ranks_file", "batch"})
        settings["data_digest"] = [judged_digest(task, part) for task, part in rows]
    description = describe("search", settings, inputs, seed)
    if done := finished(out, description):
        return done
    saved = SavedAdapter.open(adapter)
    space = saved.rank_space()
    record: dict[str, Any] | None = None
    if config.searches:
        from sqft.stages.search.study import search

        assert base is not None
        record = search(config, saved, space, base, rows, out, description, seed, trust_remote_code)
        ranks = record["chosen"]["ranks"]
    else:
        ranks = _named(config, space)
    with exclusive(out):
        # Another process that shared the search may have written it by now.
        if done := finished(out, description):
            return done
        with writing(out, description) as draft:
            write_sub_adapter(saved, space.per_module(ranks), draft.path)
            values = {
                "strategy": config.strategy,
                "ranks": ranks,
                "choices": list(space.choices),
                "groups": {group: list(modules) for group, modules in space.groups.items()},
            }
            write_json(draft.path / "sqft" / "ranks.json", values)
            if record is not None:
                write_json(draft.path / RECORD, record)
            trained = Artifact.open(adapter).manifest["result"] if _is_ours(adapter) else {}
            counts = Counter(ranks.values())
            draft.result = {
                "base_identity": trained.get("base_identity"),
                "start": trained.get("start"),
                "kind": saved.kind,
                "groups_per_rank": {str(r): counts[r] for r in sorted(counts)},
            }
            if record is not None:
                draft.result["evaluated"] = len(record["trials"])
                draft.result["accuracy"] = record["chosen"]["accuracy"]
                draft.result["heuristic_accuracy"] = record["heuristic"]["accuracy"]
    logger.info("extracted the %s sub-adapter: %s", config.strategy, dict(sorted(counts.items())))
    return Artifact.open(out)


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


def _is_ours(folder: Path) -> bool:
    return (folder / "sqft" / "manifest.json").is_file()
