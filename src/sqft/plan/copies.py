"""A model's shortened copy: the same shapes in fewer blocks, and the recipe without the layers that it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqft.errors import InputError
from sqft.model.targets import find_targets, skeleton

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from sqft.recipe import Recipe


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


def on_copy(recipe: Recipe, model: Path, copy: Path) -> Recipe:
    """Return the recipe without the patterns that match layers of the model and none of its shortened copy.

    Raises:
        InputError: no pattern of what to prune or quantise is left, so nothing can be drawn on from the copy.
    """
    whole, short = (skeleton(folder, trust_remote_code=recipe.trust_remote_code) for folder in (model, copy))
    values: dict[str, Any] = {"model": str(copy), "revision": None}
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


def _names(network: PreTrainedModel, pattern: str) -> bool:
    """Tell whether a pattern names a linear of a model's blocks."""
    try:
        return bool(find_targets(network, [pattern]))
    except InputError:
        return False
