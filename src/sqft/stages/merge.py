"""Merge: one model out of a base and an adapter, tensor by tensor on disk.

Each adapted weight is read, W' is computed by the very function that training uses, and it is written over the copy of
the base; nothing else changes. Memory stays at one weight. A dense adapter would fill the zeros of a sparse base: that
is refused with what would be lost, unless it is allowed, and then recorded.
"""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sqft.artifact import Artifact, check_space, describe, finished, writing
from sqft.errors import InputError
from sqft.model.adapter import SavedAdapter
from sqft.model.checkpoint import copy_model
from sqft.model.layers import MASK_FILE, check_base
from sqft.model.merged import BaseWeights

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sqft.recipe import MergeConfig

logger = logging.getLogger(__name__)

SPARSE_FROM = 0.25
"""Share of exact zeros from which a base without a stored mask counts as sparse."""


def run(
    config: MergeConfig, base: Path, adapter: Path, out: Path, *, seed: int = 0, trust_remote_code: bool = False
) -> Artifact:
    """Merge an adapter into its base.

    Args:
        config: whether sparsity may be lost.
        base: the base model's folder.
        adapter: the (sub-)adapter's folder.
        out: the folder to make: a standard model folder.
        seed: recorded; nothing is drawn.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the adapter is another base's, does not fit, or would fill the zeros of a sparse base.
    """
    check_base(base, adapter)
    description = describe("merge", config.model_dump(mode="json"), {"base": base, "adapter": adapter}, seed)
    if done := finished(out, description):
        return done
    saved = SavedAdapter.open(adapter)
    masked = saved.kind != "dense"
    weights = BaseWeights(base, saved, trust_remote_code=trust_remote_code)
    if not masked and not config.allow_sparsity_loss:
        _refuse_filling_zeros(weights, saved)
    check_space(out, int(weights.checkpoint.size_bytes * 1.05), "the merged model")
    with writing(out, description) as draft:
        output = copy_model(base, draft.path)
        layers = []
        for module, low in tqdm(saved.modules.items(), desc="merging", unit="linear", disable=None, leave=False):
            before, after = weights.merged(module, low, masked=masked)
            output.write(weights.names[module], after)
            layers.append(_describe_change(module, before, after))
        if masked and (base / MASK_FILE).is_file():
            shutil.copyfile(base / MASK_FILE, draft.path / MASK_FILE)
        total = sum(layer["weights"] for layer in layers)
        filled = sum(layer["filled_zeros"] for layer in layers)
        draft.result = {
            "coverage": f"merged {len(layers)} linears",
            "kind": saved.kind,
            "changed": sum(layer["changed"] for layer in layers),
            "weights": total,
            "filled_zeros": filled,
            "layers": layers,
        }
        logger.info("merged %d linears, %d of %d zeros filled", len(layers), filled, total)
    return Artifact.open(out)


def _describe_change(module: str, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    return {
        "name": module,
        "weights": before.numel(),
        "changed": int((before != after).sum()),
        "filled_zeros": int(((before == 0) & (after != 0)).sum()),
    }


def _refuse_filling_zeros(weights: BaseWeights, adapter: SavedAdapter) -> None:
    """Refuse a dense adapter on a sparse base, with what the merge would cost."""
    zeros = total = 0
    for module in adapter.modules:
        weight = weights.checkpoint.read(weights.names[module])
        zeros += int((weight == 0).sum())
        total += weight.numel()
    if (weights.base / MASK_FILE).is_file() or zeros >= SPARSE_FROM * total:
        raise InputError(
            f"adapter {adapter.path} is dense and base {weights.base} is sparse: merging would fill up to {zeros} of "
            f"the {total} adapted weights that are zero ({100 * zeros / total:.1f} % sparsity lost). Train with "
            "finetune.kind: sparse instead, serve the adapter unmerged, or allow it with merge.allow_sparsity_loss"
        )
