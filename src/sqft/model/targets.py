"""Which weights of a model are linears that can be pruned, found from the model itself.

A target is a view: (module, parameter, index). `nn.Linear` and Conv1D hold one matrix; a fused mixture of experts
holds a 3-D parameter whose slices are the experts' matrices, and on disk may lie expert by expert under other names.
transformers knows how disk and memory correspond; its conversion runs here in both directions, for tensors and for
masks alike, so no architecture is named in this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sqft.errors import InputError
from sqft.model.checkpoint import Checkpoint
from sqft.model.load import load_config, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Target:
    """One matrix [O, I] inside a module's parameter.

    Attributes:
        module: dotted name of the module.
        parameter: the parameter's name in that module.
        index: slice of a 3-D parameter (an expert), or None.
        transposed: stored as [I, O].
    """

    module: str
    parameter: str = "weight"
    index: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """A name for messages and reports: 'model.layers.0.mlp.experts.gate_up_proj[3]'."""
        base = self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"
        return base if self.index is None else f"{base}[{self.index}]"

    def view(self, model: nn.Module) -> torch.Tensor:
        """Return the matrix as a view [O, I] of the parameter."""
        tensor: torch.Tensor = model.get_submodule(self.module).get_parameter(self.parameter).data
        if self.index is not None:
            tensor = tensor[self.index]
        return tensor.T if self.transposed else tensor


def skeleton(
    folder: str | Path,
    *,
    attention: str | None = None,
    experts_one_by_one: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the model of a folder with its parameters on the meta device and its buffers real (rotary tables).

    Args:
        folder: the model folder; of a quantised one, the float model that it stands for is returned.
        attention: attention implementation; None leaves transformers' choice.
        experts_one_by_one: one product per expert, so that each can be seen, in place of transformers' grouped one.
        trust_remote_code: passed to transformers.
    """
    from accelerate import init_empty_weights

    config = load_config(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = Checkpoint(folder).dtype
    options = {} if attention is None else {"attn_implementation": attention}
    if experts_one_by_one:
        config._experts_implementation = "eager"
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except (ImportError, ValueError, KeyError) as error:
        raise InputError(f"model {folder}: transformers has no causal language model for it: {error}") from error
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return (name, list) of the decoder's blocks: the module list that holds most of the parameters.

    Raises:
        InputError: there is none.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if not outer:
        raise InputError(f"{type(model).__name__}: has no list of decoder blocks; it is not a decoder-only model")
    return max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def find_targets(
    model: PreTrainedModel, include: Iterable[str] = ("*",), ignore: Iterable[str] = ()
) -> tuple[list[Target], list[str]]:
    """Return the matrices inside the decoder blocks that the patterns choose, and the names of the others.

    Routers of experts are always among the others.

    A pattern is matched, as in a shell, against the whole name, its last part, and any trailing part of it.

    Args:
        model: a model or skeleton.
        include: patterns of what to take.
        ignore: patterns of what to leave.

    Raises:
        InputError: the model has no linears in its blocks, or a pattern matches nothing.
    """
    prefix, blocks = decoder_blocks(model)
    every: list[Target] = []
    experts: dict[str, int] = {}  # how many there are under the module that holds them
    for name, module in blocks.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            every.append(Target(name))
        elif isinstance(module, Conv1D):
            every.append(Target(name, transposed=True))
        elif not isinstance(module, _ConvNd):
            fused = _fused_experts(name, module)
            experts |= {name.rpartition(".")[0]: 1 + t.index for t in fused[-1:] if t.index is not None}
            every += fused
    if not every:
        raise InputError(f"{type(model).__name__}: no linear was found in its {len(blocks)} blocks ({prefix})")
    include, ignore = list(include), list(ignore)
    for pattern in [*include, *ignore]:
        if not any(_matches(t.name, pattern) for t in every):
            kinds = sorted({re.sub(r"\[\d+\]$", "", t.name).rsplit(".", 1)[-1] for t in every})
            raise InputError(f"pattern {pattern!r} matches no linear; the model's are {', '.join(kinds)}")
    # A router is a linear too, beside the experts, with one output an expert (or one, for a shared expert): tiny and
    # decisive. Peers leave it dense as well.
    routers = {
        t
        for t in every
        for parent, count in experts.items()
        if t.index is None and t.module.startswith(f"{parent}.") and t.view(model).shape[0] in {1, count}
    }
    chosen = [
        t
        for t in every
        if t not in routers
        and any(_matches(t.name, p) for p in include)
        and not any(_matches(t.name, p) for p in ignore)
    ]
    if not chosen:
        raise InputError(f"targets {include} and ignore {ignore} leave no linear; take less out")
    kept = {t.name for t in chosen}
    return chosen, [t.name for t in every if t.name not in kept]


def coverage_of(chosen: list[Target], left: list[str], how: str = "") -> str:
    """Return how many linears a stage took, for its report: '12/14 linears; skipped a, b (ignored, or a router)'."""
    text = f"{len(chosen)}/{len(chosen) + len(left)} linears{how}"
    if not left:
        return text
    return f"{text}; skipped {', '.join(left[:4])}{', ...' if len(left) > 4 else ''} (ignored, or a router)"


def _fused_experts(name: str, module: nn.Module) -> list[Target]:
    """Return the slices of 3-D parameters that hold one matrix an expert."""
    transposed = bool(getattr(module, "is_transposed", False))
    return [
        Target(name, parameter, index, transposed)
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3
        for index in range(value.shape[0])
    ]


def _matches(name: str, pattern: str) -> bool:
    plain = re.sub(r"\[\d+\]$", "", name)
    return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in (name, plain))


class DiskNames:
    """How a checkpoint's tensors correspond to a model's parameters.

    Args:
        model: the skeleton.
        checkpoint: its folder's tensors.
        skip: tensors that are no parameters: the parts of quantised weights.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, skip: Collection[str] = ()) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        self.checkpoint = checkpoint
        self.conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        self._state = model.state_dict()
        self.parameter_of = {name: self.parameter(name) for name in checkpoint.entries if name not in skip}

    def parameter(self, name: str) -> str:
        """Return the parameter that a tensor of this name on disk belongs to."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(
            name, self._renamings, self._converters, self.model.base_model_prefix, self._state
        )
        return name if renamed not in self._state and name in self._state else str(renamed)

    def load(self, prefix: str, *, exclude: tuple[str, ...] = ()) -> None:
        """Read the parameters whose names start with `prefix` into the skeleton."""
        self._load(
            {
                name: self.checkpoint.read(name)
                for name, parameter in self.parameter_of.items()
                if parameter.startswith(prefix) and not parameter.startswith(exclude)
            }
        )

    def in_memory(self, prefix: str, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return on-disk masks as bool masks of the loaded parameters under `prefix`; True where none is given.

        The masks go the way of the weights: loaded in their place, taken out, and the weights put back.
        """
        loaded = {n: p.data for n, p in self.model.named_parameters() if n.startswith(prefix)}
        tensors = {}
        for name, parameter in self.parameter_of.items():
            if parameter.startswith(prefix):
                entry = self.checkpoint.entries[name]
                mask = masks.get(name)
                tensors[name] = torch.ones(entry.shape, dtype=entry.dtype) if mask is None else mask.to(entry.dtype)
        self._load(tensors)
        found = {name: self.model.get_parameter(name).data != 0 for name in loaded}
        for name, value in loaded.items():
            self.model.get_parameter(name).data = value
        return found

    def _load(self, tensors: dict[str, Any]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(weight_mapping=cast(Any, self.conversions), dtype=None)
        with quiet_transformers():
            convert_and_load_state_dict_in_model(self.model, tensors, options)

    def to_disk(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return parameters (or masks) of whole blocks under their on-disk names and layouts.

        Args:
            values: {parameter name: tensor}, of blocks that were loaded; a parameter that shares a tensor on disk
                with others must come with them.
        """
        from transformers.core_model_loading import revert_weight_conversion

        # load() has left on the model the conversions that this checkpoint really uses; they are reverted here.
        result = {}
        for name, tensor in revert_weight_conversion(self.model, values).items():
            short = name.removeprefix(f"{self.model.base_model_prefix}.")
            found = next((n for n in (name, short) if n in self.checkpoint.entries), None)
            if found is not None:
                result[found] = tensor
        return result
