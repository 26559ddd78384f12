"""Which weights of a model are linears that can be pruned, found from the model itself.

A target is a view: (module, parameter, index). `nn.Linear` and Conv1D hold one matrix; any other parameter is what the
model uses it as (:mod:`sqft.model.uses`): a fused mixture of experts is a stack of matrices. No architecture is named
here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sqft.errors import InputError, Problems
from sqft.model.opening import check_blocks, load_config
from sqft.model.uses import Matrices, Use, parameter_uses
from sqft.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_SMALL_SHARE = 0.01
"""Share of a block's weights below which a parameter that is no linear's is left as it is."""
_SMALL, _ROUTER = "small", "a router"


@dataclass(frozen=True)
class Target:
    """One matrix [O, I] inside a module's parameter.

    Attributes:
        module: dotted name of the module.
        parameter: the parameter's name in that module.
        index: which of the parameter's matrices (an expert), or None where it is one.
        transposed: stored as [I, O].
        parts: how many matrices share the first axis of a parameter of two; None: each has an index of its own.
    """

    module: str
    parameter: str = "weight"
    index: int | None = None
    transposed: bool = False
    parts: int | None = None

    @property
    def name(self) -> str:
        """A name for messages and reports: 'model.layers.0.mlp.experts.gate_up_proj[3]'."""
        base = self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"
        return base if self.index is None else f"{base}[{self.index}]"

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrix as a view [O, I] of the parameter's tensor, or of one of its shape."""
        if self.parts is not None:
            tensor = tensor.unflatten(0, (self.parts, -1))
        if self.index is not None:
            tensor = tensor[self.index]
        return tensor.T if self.transposed else tensor

    def view(self, model: nn.Module) -> torch.Tensor:
        """Return the matrix as a view [O, I] of the model's parameter."""
        return self.of(model.get_submodule(self.module).get_parameter(self.parameter).data)


def skeleton(
    folder: str | Path, *, experts_one_by_one: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of a folder with its parameters on the meta device and its buffers real (rotary tables).

    Args:
        folder: the model folder; of a quantised one, the float model that it stands for is returned.
        experts_one_by_one: one product per expert, so that each can be seen, in place of transformers' grouped one.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the config makes no model, or one of more blocks than there are tensors.
    """
    from accelerate import init_empty_weights

    checkpoint = Checkpoint(folder)
    check_blocks(folder, len(checkpoint.entries))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if experts_one_by_one:
        config._experts_implementation = "eager"
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=checkpoint.dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a damaged config may make a model's constructor raise anything
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model {folder}: transformers makes no causal language model of its config: {said}"
        ) from error
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return (name, list) of the decoder's blocks: the module list that holds most of the text model's parameters.

    In a model of text and images, the text model is what has the text config.

    Raises:
        InputError: there is none, or it is empty.
    """
    text = type(model.config.get_text_config(decoder=True))
    lists: dict[str, nn.ModuleList] = {}
    owners: dict[str, PreTrainedModel] = {"": model}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        elif isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    nearest = {name: max((o for o in owners if f"{name}.".startswith(f"{o}." if o else "")), key=len) for name in lists}
    of_text = {name: module for name, module in lists.items() if type(owners[nearest[name]].config) is text}
    if not lists:
        raise InputError(f"{type(model).__name__}: has no list of decoder blocks; it is not a decoder-only model")
    found = max((of_text or lists).items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    if len(found[1]) == 0:
        raise InputError(f"{type(model).__name__}: has 0 decoder blocks ({found[0]}); its config.json is damaged")
    return found


def every_matrix(model: PreTrainedModel) -> tuple[list[Target], dict[Target, str]]:
    """Return all matrices inside the decoder blocks, and why those are left out that are never chosen.

    Left out are routers, small parameters that are no linear's, and those whose use is unclear.
    """
    prefix, blocks = decoder_blocks(model)
    uses = parameter_uses(model, prefix, blocks)
    every: list[Target] = []
    unfit: dict[Target, str] = {}
    stacks: dict[str, int] = {}  # how many matrices a module's parameters have each
    memo: set[nn.Module] = set()  # blocks may share a module
    for index, block in enumerate(blocks):
        small = _SMALL_SHARE * sum(p.numel() for p in block.parameters())
        for name, module in block.named_modules(memo, f"{prefix}.{index}"):
            if isinstance(module, nn.Linear | Conv1D):
                every.append(Target(name, transposed=isinstance(module, Conv1D)))
            for parameter, value in module.named_parameters(recurse=False):
                use = uses.get(f"{name}.{parameter}")
                found = [] if use is None else _matrices(name, parameter, use)
                every += found
                if isinstance(use, Matrices) and use.count is not None:
                    stacks[name] = use.count
                elif value.numel() < small:
                    unfit |= dict.fromkeys(found, _SMALL)
                elif isinstance(use, str):
                    unfit |= dict.fromkeys(found, use)
    return every, {**_routers(model, prefix, every, stacks), **unfit}


def fit_matrices(model: PreTrainedModel) -> list[Target]:
    """Return the matrices of :func:`every_matrix` that are not left out."""
    every, unfit = every_matrix(model)
    return [target for target in every if target not in unfit]


def _matrices(module: str, parameter: str, use: Use) -> list[Target]:
    """Return the matrices of a parameter that is no linear's; one whose use is unclear counts as one."""
    if isinstance(use, str):
        return [Target(module, parameter)]
    parts = use.count if use.parts else None
    indices = [None] if use.count is None else range(use.count)
    return [Target(module, parameter, index, use.transposed, parts) for index in indices]


def _routers(model: PreTrainedModel, prefix: str, every: list[Target], stacks: dict[str, int]) -> dict[Target, str]:
    """Return the routers: beside the experts, with one output an expert, or one in all for a shared expert.

    They are tiny and decisive. Peers leave them dense as well.
    """
    single = [t for t in every if t.index is None]
    found: dict[Target, str] = {}
    for module, count in stacks.items():
        block = ".".join(module.split(".")[: prefix.count(".") + 2])
        near = [t for t in single if t.module.startswith(f"{block}.")]
        parent = module.rpartition(".")[0]
        while parent not in (block, "") and not any(t.module.startswith(f"{parent}.") for t in near):
            parent = parent.rpartition(".")[0]
        beside = [t for t in near if t.module.startswith(f"{parent}.")]
        found |= {t: _ROUTER for t in beside if t.view(model).shape[0] in {1, count}}
    return found


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
        InputError: the model has no linears in its blocks, a pattern matches nothing, or it is unclear how the model
            uses a parameter that is chosen.
    """
    every, unfit = every_matrix(model)
    if not every:
        prefix, blocks = decoder_blocks(model)
        raise InputError(f"{type(model).__name__}: no linear was found in its {len(blocks)} blocks ({prefix})")
    include, ignore = list(include), list(ignore)
    for pattern in [*include, *ignore]:
        if not any(_matches(t.name, pattern) for t in every):
            kinds = sorted({_plain(t.name).rsplit(".", 1)[-1] for t in every})
            raise InputError(f"pattern {pattern!r} matches no linear; the model's are {', '.join(kinds)}")
    wanted = [
        t for t in every if any(_matches(t.name, p) for p in include) and not any(_matches(t.name, p) for p in ignore)
    ]
    _refuse_unclear(model, {t: unfit[t] for t in wanted if unfit.get(t, _SMALL) not in (_SMALL, _ROUTER)})
    chosen = [t for t in wanted if t not in unfit]
    if not chosen:
        raise InputError(f"targets {include} and ignore {ignore} leave no linear; take less out")
    kept = {t.name for t in chosen}
    return chosen, [t.name for t in every if t.name not in kept]


def _refuse_unclear(model: PreTrainedModel, unclear: Mapping[Target, str]) -> None:
    """Raise an error that names the parameters, those of the same name in other blocks together."""
    alike: dict[str, list[Target]] = {}
    for target in unclear:
        alike.setdefault(target.name.rpartition(".")[2], []).append(target)
    with Problems(f"{type(model).__name__}: it is unclear how it uses some of its weights") as problems:
        for last, (first, *others) in alike.items():
            shape = list(model.get_parameter(f"{first.module}.{first.parameter}").shape)
            more = f" and {len(others)} more" if others else ""
            problems.add(f"{first.name} {shape}{more}: {unclear[first]}; leave it out with ignore: ['*.{last}']")


def coverage_of(model: PreTrainedModel, chosen: list[Target], left: list[str], how: str = "") -> str:
    """Return what a stage took, for its report.

    '12/14 linears, 97.1 % of the blocks' weights; skipped a, b (ignored, small, or a router)'.

    Args:
        model: the model or skeleton.
        chosen: the matrices that were taken.
        left: names of the others.
        how: said behind the linears.
    """
    weights = sum(p.numel() for p in decoder_blocks(model)[1].parameters())
    # Rounded down: only all of them are 100 %.
    share = math.floor(1000 * sum(t.view(model).numel() for t in chosen) / weights) / 10
    text = f"{len(chosen)}/{len(chosen) + len(left)} linears{how}, {share:.1f} % of the blocks' weights"
    if not left:
        return text
    return f"{text}; skipped {', '.join(left[:4])}{', ...' if len(left) > 4 else ''} (ignored, small, or a router)"


def _plain(name: str) -> str:
    return re.sub(r"\[\d+\]$", "", name)


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in (name, _plain(name)))
