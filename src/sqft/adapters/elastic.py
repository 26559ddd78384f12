"""Elastic ranks on a live model: which modules share a rank, setting ranks, and drawing them while training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from sqft.adapters.layers import sqft_layers
from sqft.core.ranks import group_modules
from sqft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from sqft.adapters.layers import SqftLinear
    from sqft.core.ranks import RankSpace


def rank_space(model: nn.Module) -> RankSpace:
    """Return the rank space of a model's adapters; see :func:`sqft.core.ranks.group_modules`.

    Raises:
        InputError: the model has no adapters of ours.
    """
    layers = sqft_layers(model)
    if not layers:
        raise InputError("the model has no sqft adapters; attach some with get_peft_model(model, SqftConfig(...))")
    config = next(iter(model.peft_config.values()))  # type: ignore[operator]
    return group_modules(layers, config.ranks or [config.r], config.rank_groups)


def set_ranks(model: nn.Module, ranks: Mapping[str, int] | None) -> None:
    """Make evaluation and merging use a configuration {group: rank}; None is the maximal ranks again.

    `save_pretrained` still writes all ranks: `sqft extract` takes a sub-adapter out of what it wrote.
    """
    space = rank_space(model)
    layers = sqft_layers(model)
    for layer in layers.values():
        layer.fixed_rank = None
    if ranks is not None:
        for module, rank in space.per_module(space.check(ranks, "set_ranks")).items():
            layers[module].fixed_rank = rank


class ElasticRanks(TrainerCallback):
    """Trainer callback that draws one configuration per optimiser step, from (seed, step) alone.

    The draw does not depend on the process, on gradient checkpointing or on a resume, and all micro-batches of a step
    share it.

    >>> trainer = Trainer(model, args, callbacks=[ElasticRanks(seed=0)])  # doctest: +SKIP
    """

    def __init__(self, seed: int) -> None:
        """Remember the seed."""
        self.seed = seed
        self._space: RankSpace | None = None
        self._layers: dict[str, SqftLinear] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Draw and set the ranks of step `state.global_step`."""
        assert model is not None
        if self._space is None:
            # Once: a walk through all modules takes as long as many a layer's step on a GPU.
            self._space, self._layers = rank_space(model), sqft_layers(model)
        draw = self._space.per_module(self._space.draw(self.seed, state.global_step))
        for name, layer in self._layers.items():
            layer.drawn_rank = draw[name]
