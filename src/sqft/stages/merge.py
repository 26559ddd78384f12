"""Merge: one model out of a base and an adapter, tensor by tensor on disk.

Each adapted weight is read, W' (on a quantised base the codes of Ŵ') is computed by the very function that training
uses, and it is written over the copy of the base; nothing else changes. Memory stays at one weight. A dense adapter
would fill the zeros of a sparse base and leave the grid of a quantised one: that is refused with what would be lost,
unless it is allowed, and then recorded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqft.adapters.attach import check_trained_on
from sqft.adapters.merged import BaseWeights
from sqft.adapters.saved import SavedAdapter
from sqft.disk import check_space
from sqft.errors import Problems
from sqft.memory import release_memory
from sqft.progress import progress
from sqft.stage import Stage
from sqft.storage.checkpoint import copy_model
from sqft.storage.masks import SPARSE_FROM, copy_masks, load_mask

if TYPE_CHECKING:
    from pathlib import Path

    from sqft.artifact import Artifact, Draft
    from sqft.context import Context
    from sqft.recipe import MergeConfig
    from sqft.storage.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def run(config: MergeConfig, base: Path, adapter: Path, out: Path, context: Context) -> Artifact:
    """Merge an adapter into its base.

    Args:
        config: whether sparsity or precision may be lost.
        base: the base model's folder.
        adapter: the (sub-)adapter's folder.
        out: the folder to make: a standard model folder.
        context: its seed is recorded; nothing is drawn.

    Raises:
        InputError: the adapter is another base's, does not fit, or would lose zeros or precision of the base.
    """

    def ready() -> tuple[SavedAdapter, BaseWeights]:
        saved = SavedAdapter.open(adapter)
        check_trained_on(base, saved)
        weights = BaseWeights(base, saved, device=context.device, trust_remote_code=context.trust_remote_code)
        if saved.kind == "dense":
            _refuse_losses(config, weights, saved)
        check_space(out, int(weights.checkpoint.size_bytes * 1.05), "the merged model")
        return saved, weights

    def work(ready: tuple[SavedAdapter, BaseWeights], draft: Draft) -> dict[str, Any]:
        saved, weights = ready
        layers = _write_merged(saved, weights, copy_model(base, draft.path))
        if saved.kind != "dense":
            copy_masks(base, draft.path)
        return _result(saved, weights, layers)

    inputs = {"base": base, "adapter": adapter}
    return Stage.of("merge", out, config.model_dump(mode="json"), inputs, context.seed).make(ready, work)


def _write_merged(saved: SavedAdapter, weights: BaseWeights, output: Checkpoint) -> list[dict[str, Any]]:
    """Write every merged weight over the base's, and return what changed in each."""
    layers: list[dict[str, Any]] = []
    with progress(len(saved.modules), "merging", "linear") as advance:
        for module, low in saved.modules.items():
            merged = weights.merged(module, low)
            output.write(merged.name, merged.tensor)
            counts = {name: getattr(merged, name) for name in ("weights", "zeros", "changed", "pruned", "filled_zeros")}
            layers.append({"name": module, **counts})
            del merged
            release_memory()  # else heap that training has freed fills again, piece by piece, and stays
            advance(1)
    return layers


def _result(saved: SavedAdapter, weights: BaseWeights, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the manifest says was done."""
    total, changed, filled, pruned = (
        sum(layer[name] for layer in layers) for name in ("weights", "changed", "filled_zeros", "pruned")
    )
    zeros = f"{filled} of {pruned} pruned ones filled" if pruned else "none of them pruned before"
    logger.info("merged %d linears of %d weights, %s", len(layers), total, zeros)
    return {
        "coverage": f"merged {len(layers)} linears",
        "kind": saved.kind,
        "precision": "float" if weights.packed is None else f"int{weights.packed.scheme.bits}",
        "lossy": saved.kind == "dense" and weights.any_packed,
        "changed": changed,
        "weights": total,
        "pruned": pruned,
        "filled_zeros": filled,
        "layers": layers,
    }


def _refuse_losses(config: MergeConfig, weights: BaseWeights, adapter: SavedAdapter) -> None:
    """Refuse a dense adapter where merging it would lose something, with what that is and the ways out."""
    where = f"adapter {adapter.path} is dense and base {weights.base}"
    with Problems(f"{where} is compressed: merging would not give the model that was trained") as problems:
        if weights.packed is not None and weights.any_packed and not config.allow_precision_loss:
            bits = weights.packed.scheme.bits
            problems.add(
                f"the base has {bits}-bit weights, and W + BA is not on their grid: rounding it back changes every "
                "answer a little. Train with finetune.kind: quantized, which merges exactly, serve the adapter "
                "unmerged, or allow the loss with merge.allow_precision_loss; sqft verify then reports it"
            )
        if not config.allow_sparsity_loss:
            zeros, total = _zeros(weights, adapter)
            masked = any(load_mask(weights.base, weights.names[module]) is not None for module in adapter.modules)
            if masked or (weights.packed is None and zeros >= SPARSE_FROM * total):
                kind = "sparse" if weights.packed is None else "quantized"
                problems.add(
                    f"the base is sparse: up to {zeros} of the {total} adapted weights that are zero would be filled "
                    f"({100 * zeros / total:.1f} % sparsity lost). Train with finetune.kind: {kind} instead, serve the "
                    "adapter unmerged, or allow it with merge.allow_sparsity_loss"
                )


def _zeros(weights: BaseWeights, adapter: SavedAdapter) -> tuple[int, int]:
    """Return (zeros, weights) of the adapted linears."""
    zeros = total = 0
    for module in adapter.modules:
        if weights.packed is not None and weights.is_packed(module):
            codes, grid = weights.packed.read(weights.names[module])
            zero = codes == grid.zero_codes()
        else:
            zero = weights.checkpoint.read(weights.names[module]) == 0
        zeros += int(zero.count_nonzero())
        total += zero.numel()
    return zeros, total
