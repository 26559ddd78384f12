"""Verify: prove that a merged model is its base with its adapter, and that the zeros are still there.

A proof holds for the bytes that were hashed for it: `made_from.inputs` in verify.json has digest, files and bytes of
the three folders, and a proof of other bytes is not taken for one of these.

Checks, each with its value and bound, in verify.json:
- `zeros_kept`: no weight outside the base's mask is non-zero, in any layer.
- `weights_equal`: every adapted weight is W' of base and adapter, to the bit; of a quantised base `codes_equal`: every
  code is the one that the live adapter computes.
- `grid_untouched`: scales and zero points are the base's, to the bit (quantised bases).
- `rest_untouched`: every other tensor is the base's, to the bit.
- `all_finite`: no weight of the merged model and no logit of either model is NaN or Inf. With one, no distance means
  anything, and the comparison of logits is left out.
- `adapter_applied`: merging changed something; a merge that did nothing would pass the others.
- `logits_equal`: logits of base + adapter against merged on held-out prompts, the merged model opened as its users
  would. Masked kinds run the same matmul on the same weight, so the bound is 0. A dense adapter that was rounded onto a
  quantised base's grid is lossy: both checks fail and say by how much.
- `logits_close` in its place for a dense adapter on a float base, whose sum is rounded to the model's precision: how
  far that moves a logit on average (both models run in float32, float32 ones in float64), as a share of how far running
  in the model's own precision moves it. Up to 1, merging costs less than computing does.
- `accuracy_equal`: the same held-out rows are answered right.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from sqft.adapters.attach import check_trained_on
from sqft.adapters.merged import BaseWeights
from sqft.adapters.saved import SavedAdapter
from sqft.core.mask import finite
from sqft.device import device_key
from sqft.digests import digest_file, digest_text
from sqft.disk import read_json
from sqft.memory import costing
from sqft.stage import Stage
from sqft.stages.verify.behaviour import Side, check, compare
from sqft.storage.checkpoint import Checkpoint, side_files
from sqft.storage.integers import PackedCheckpoint
from sqft.storage.masks import load_mask

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sqft.context import Context
    from sqft.data.tasks import Example, Task
    from sqft.recipe import VerifyConfig


def run(
    config: VerifyConfig,
    merged: Path,
    base: Path,
    adapter: Path,
    out_file: Path,
    context: Context,
    *,
    task: Task | None = None,
    examples: Sequence[Example] = (),
) -> dict[str, Any]:
    """Check a merged model and write what was found; a failed check is a result, not an exception.

    Args:
        config: how much to check, and the bound.
        merged: the merged model's folder.
        base: the base's folder.
        adapter: the (sub-)adapter's folder.
        out_file: verify.json.
        context: its seed is that of the random tokens.
        task: whose metric judges the accuracy; without one, accuracy is not checked and logits are compared on
            seeded random tokens.
        examples: held-out rows of the task.

    Returns:
        {passed, checks: [{name, passed, value, bound, detail}]}.

    Raises:
        InputError: a folder cannot be read, or the adapter is another base's.
    """
    saved = SavedAdapter.open(adapter)
    check_trained_on(base, saved)
    inputs: dict[str, str | Path] = {"merged": merged, "base": base, "adapter": adapter}
    settings = {
        **config.model_dump(mode="json"),
        "task": task.name if task else None,
        "examples": digest_text(json.dumps([(e.prompt, e.answer) for e in examples])),
        **device_key(context.device),
    }
    stage = Stage.of("verify", out_file, settings, inputs, context.seed)
    return stage.record(lambda: _prove(config, merged, saved, base, task, examples, context))


def _prove(
    config: VerifyConfig,
    merged: Path,
    saved: SavedAdapter,
    base: Path,
    task: Task | None,
    examples: Sequence[Example],
    context: Context,
) -> dict[str, Any]:
    """Return {passed, checks, cost}."""
    weights = BaseWeights(base, saved, device=context.device, trust_remote_code=context.trust_remote_code)
    output = Checkpoint(merged)
    found, not_finite = _weights(weights, saved, output)
    checks = [_zeros_kept(weights, output, merged), *found]
    # Two products against one, and their sum rounded to the model's precision. Onto a grid it is a loss, not rounding.
    rounded = saved.kind == "dense" and not weights.any_packed
    pair = (Side(base, saved), Side(merged))
    with costing() as cost:
        checks += compare(config, pair, task, examples, context, rounded=rounded, not_finite=not_finite)
    return {"passed": all(found["passed"] for found in checks), "checks": checks, "cost": cost}


def _zeros_kept(weights: BaseWeights, output: Checkpoint, merged: Path) -> dict[str, Any]:
    new: dict[str, int] = {}
    pruned = 0
    adapted = {name: module for module, name in weights.names.items()}
    packed = None if weights.packed is None else PackedCheckpoint(merged)
    names = list(weights.checkpoint.entries) + ([] if weights.packed is None else list(weights.packed.shapes))
    for name in names:
        mask = load_mask(weights.base, name)
        if mask is None and name in adapted:
            mask = weights.promised(adapted[name])
        if mask is None:
            continue
        if packed is not None and name in packed.shapes:
            codes, grid = packed.read(name)
            kept = codes != grid.zero_codes()
        elif name in output.entries:
            kept = output.read(name) != 0
        else:
            continue  # rest_untouched names what is missing
        if kept.shape != mask.shape:
            continue
        pruned += int((~mask).count_nonzero())
        count = int((kept & ~mask).count_nonzero())
        if count:
            new[name] = count
    detail = f"{pruned} pruned weights are zero" if pruned else "the base is not pruned"
    if new:
        worst = sorted(new.items(), key=lambda item: -item[1])[:5]
        detail = "new non-zeros in " + ", ".join(f"{name} ({count})" for name, count in worst)
    return check("zeros_kept", sum(new.values()), 0, detail)


def _weights(weights: BaseWeights, adapter: SavedAdapter, output: Checkpoint) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare every tensor of the merged model with what it must be; name those that are not finite."""
    differing: list[str] = []
    not_finite: list[str] = []
    changed = 0
    for module, low in adapter.modules.items():
        expected = weights.merged(module, low)
        found = output.read(expected.name) if expected.name in output.entries else None
        if found is None or found.shape != expected.tensor.shape or not torch.equal(found, expected.tensor):
            differing.append(expected.name)
        elif expected.changed:
            changed += 1
    adapted = {weights.stored_name(module) for module in adapter.modules}
    grid = set() if weights.packed is None else set(weights.packed.stored_names()) - adapted
    touched = [name for name in output.entries if name not in weights.checkpoint.entries]
    touched += [name for name in weights.checkpoint.entries if name not in output.entries]
    for name in output.entries:
        tensor = output.read(name)
        if tensor.is_floating_point() and not finite(tensor if tensor.itemsize > 1 else tensor.float()):
            not_finite.append(name)
        known = name in weights.checkpoint.entries and name not in adapted
        if known and not torch.equal(_bits(tensor), _bits(weights.checkpoint.read(name))):
            touched.append(name)
    what = "weights equal W'" if weights.packed is None else "linears have the live adapter's codes,"
    checks = [
        _none(
            "weights_equal" if weights.packed is None else "codes_equal",
            differing,
            f"{len(adapted)} adapted {what} to the bit",
        )
    ]
    if weights.packed is not None:
        moved = [name for name in touched if name in grid]
        checks.append(_none("grid_untouched", moved, f"{len(weights.packed.shapes)} grids are the base's to the bit"))
    files, differing_files = _files(weights.base, output.folder)
    others = [name for name in touched if name not in grid] + differing_files
    rest = len(set(weights.checkpoint.entries) - adapted - grid)
    detail = f"{rest} other tensors and {files} files beside them equal the base's to the bit"
    checks.append(_none("rest_untouched", others, detail))
    detail = f"{changed} of {len(adapted)} adapted weights differ from the base's" if changed else "nothing was merged"
    return [*checks, check("adapter_applied", 0 if changed else 1, 0, detail)], not_finite


def _files(base: Path, merged: Path) -> tuple[int, list[str]]:
    """Return how many files lie beside the base's weights, and which the merged model has otherwise."""
    ours, theirs = ({str(p.relative_to(f)): p for p in side_files(f)} for f in (base, merged))

    def content(path: Path) -> Any:
        if path.name != "config.json":
            return digest_file(path)
        # Merging lets it name the dtype that the weights have.
        return {name: value for name, value in read_json(path).items() if name not in ("dtype", "torch_dtype")}

    names = {**ours, **theirs}
    return len(ours), [
        name for name in names if name not in ours or name not in theirs or content(ours[name]) != content(theirs[name])
    ]


def _none(name: str, differing: list[str], detail: str) -> dict[str, Any]:
    """Return a check that passes when nothing differs."""
    return check(name, len(differing), 0, f"differ: {', '.join(differing[:5])}" if differing else detail)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
