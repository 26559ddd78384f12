"""A shortened copy of a model (same shapes, fewer blocks), and the recipe without patterns for missing layers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqft.errors import InputError
from sqft.model.targets import decoder_blocks, find_targets, skeleton

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from sqft.recipe import Recipe, TeacherConfig


def shorten(model: Path, config: PretrainedConfig, count: int, folder: Path, *, trust_remote_code: bool) -> None:
    """Write a model of the same shapes with `count` blocks and random weights."""
    import copy

    from transformers import AutoModelForCausalLM

    from sqft.model.opening import quiet_transformers
    from sqft.storage.checkpoint import copy_side_files

    short = copy.deepcopy(config)
    inner = short.get_text_config(decoder=True)
    inner.num_hidden_layers = count
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:count]
    with quiet_transformers():
        made = AutoModelForCausalLM.from_config(short, dtype=config.dtype, trust_remote_code=trust_remote_code)
        made.save_pretrained(folder)
    copy_side_files(model, folder)
    short.save_pretrained(folder)


def shorten_adapter(adapter: Path, copy: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Write an adapter without the tensors of blocks that a shortened model lacks."""
    from safetensors.torch import load_file, save_file

    from sqft.adapters.saved import CONFIG, WEIGHTS
    from sqft.disk import read_json, write_json

    blocks, left = decoder_blocks(skeleton(copy, trust_remote_code=trust_remote_code))
    block_of = re.compile(rf"base_model\.model\.{re.escape(blocks)}\.(\d+)\.")
    tensors = load_file(adapter / WEIGHTS)
    kept = {n: t for n, t in tensors.items() if (found := block_of.match(n)) is None or int(found[1]) < len(left)}
    folder.mkdir(parents=True)
    # The copy is not the base that the adapter's config names.
    write_json(folder / CONFIG, {**read_json(adapter / CONFIG), "base_model_name_or_path": None})
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def on_copy(recipe: Recipe, model: Path, copy: Path, given: Path | None = None) -> Recipe:
    """Return the recipe for a shortened copy, without patterns that match only layers missing in the copy.

    Args:
        recipe: the recipe.
        model: its model's folder.
        copy: the copy's folder.
        given: the folder of the adapter or tuned model of its section teacher.

    Raises:
        InputError: no pattern of layers to prune or quantise is left, so the copy allows no extrapolation.
    """
    whole, short = (skeleton(folder, trust_remote_code=recipe.trust_remote_code) for folder in (model, copy))
    values: dict[str, Any] = {"model": str(copy), "revision": None}
    if recipe.teacher is not None and given is not None:
        values["teacher"] = _teacher_on_copy(recipe.teacher, given, copy, trust_remote_code=recipe.trust_remote_code)
    for stage in ("sparsify", "quantize"):
        settings = getattr(recipe, stage)
        if settings is None:
            continue
        kept = {
            field: [
                pattern for pattern in getattr(settings, field) if _names(short, pattern) or not _names(whole, pattern)
            ]
            for field in ("targets", "ignore")
        }
        if not kept["targets"]:
            raise InputError(
                f"recipe {recipe.name}: {stage}.targets {settings.targets} name late layers alone, which a shortened "
                "model lacks; a forecast needs patterns that match layers throughout"
            )
        values[stage] = settings.model_copy(update=kept)
    return recipe.model_copy(update=values)


def _teacher_on_copy(config: TeacherConfig, given: Path, copy: Path, *, trust_remote_code: bool) -> TeacherConfig:
    """Return the teacher of a copy: its adapter shortened as well, or for a tuned model the copy itself."""
    if config.adapter is None:
        return config.model_copy(update={"model": str(copy), "revision": None})
    shorter = copy.with_name("adapter")
    shorten_adapter(given, copy, shorter, trust_remote_code=trust_remote_code)
    return config.model_copy(update={"adapter": str(shorter), "revision": None})


def _names(network: PreTrainedModel, pattern: str) -> bool:
    """Return whether a pattern matches a linear in a model's blocks."""
    try:
        return bool(find_targets(network, [pattern]))
    except InputError:
        return False
