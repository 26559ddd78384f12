"""Search: choose a sub-adapter and write it as a PEFT adapter with its own ranks.

Here: the named points of the space (heuristic, maximal, minimal) and a file of ranks. The adapter's factors are sliced
on disk; no model is loaded.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sqft.artifact import Artifact, describe, finished, write_json, writing
from sqft.errors import InputError
from sqft.model.adapter import SavedAdapter, write_sub_adapter
from sqft.model.load import read_json

if TYPE_CHECKING:
    from sqft.core.ranks import RankSpace
    from sqft.recipe import SearchConfig

logger = logging.getLogger(__name__)


def run(config: SearchConfig, adapter: Path, out: Path, *, seed: int = 0) -> Artifact:
    """Extract a sub-adapter from a super-adapter.

    Args:
        config: which point of the rank space.
        adapter: the super-adapter's folder.
        out: the folder to make.
        seed: recorded; nothing is drawn.

    Raises:
        InputError: the adapter or the file of ranks cannot be used.
    """
    inputs: dict[str, str | Path] = {"adapter": adapter}
    if config.strategy == "file":
        if config.ranks_file is None:
            raise InputError("search.strategy is 'file', but search.ranks_file is not given")
        if not Path(config.ranks_file).is_file():
            raise InputError(f"search.ranks_file {config.ranks_file}: no such file; give a JSON object {{group: rank}}")
        inputs["ranks"] = config.ranks_file
    settings = config.model_dump(mode="json", exclude={"ranks_file"})
    description = describe("search", settings, inputs, seed)
    if done := finished(out, description):
        return done
    saved = SavedAdapter.open(adapter)
    space = saved.rank_space()
    ranks = choose(config, space)
    with writing(out, description) as draft:
        write_sub_adapter(saved, space.per_module(ranks), draft.path)
        values = {
            "strategy": config.strategy,
            "ranks": ranks,
            "choices": list(space.choices),
            "groups": {group: list(modules) for group, modules in space.groups.items()},
        }
        write_json(draft.path / "sqft" / "ranks.json", values)
        trained = Artifact.open(adapter).manifest["result"] if _is_ours(adapter) else {}
        counts = Counter(ranks.values())
        draft.result = {
            "base_identity": trained.get("base_identity"),
            "start": trained.get("start"),
            "kind": saved.kind,
            "groups_per_rank": {str(r): counts[r] for r in sorted(counts)},
        }
    logger.info("extracted the %s sub-adapter: %s", config.strategy, dict(sorted(counts.items())))
    return Artifact.open(out)


def choose(config: SearchConfig, space: RankSpace) -> dict[str, int]:
    """Return the configuration that the recipe asks for."""
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
