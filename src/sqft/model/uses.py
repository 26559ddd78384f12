"""How a decoder block uses the parameters that belong to no linear: which are stacks of matrices, and which axis is I.

Shapes do not say: experts lie as [E, O, I], [E, I, O] or [E·O, I], and a [1, 1, H] vector looks like any of them. A
block is therefore run once on zeros, two tokens long, while every matrix product is watched. Its weights are zeros that
the system maps without memory, so a block of any size can be run; blocks of one kind (the same modules and shapes) are
run once. What takes part in no product is a vector. What takes part in a way that has no one axis of inputs, or through
a copy, is unclear: it is said so, and never guessed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sqft.model.products import Product, products

if TYPE_CHECKING:
    from collections.abc import Mapping

_OF_KNOWN_USE = (nn.Linear, Conv1D, _ConvNd, nn.Embedding)
_UNFOLLOWED = {
    *("multi_head_attention_forward", "scaled_dot_product_attention", "tensordot", "bilinear", "inner"),
    *("chain_matmul", "multi_dot", "conv1d", "conv2d", "conv3d", "embedding"),
}
"""Functions that multiply matrices inside, where no product is seen."""


@dataclass(frozen=True)
class Matrices:
    """How the matrices of a parameter lie in it.

    Attributes:
        count: how many there are along its first axis; None: the parameter is one matrix.
        parts: the first axis has the rows of all of them, one matrix behind the other.
        transposed: each is stored as [I, O].
    """

    count: int | None
    parts: bool
    transposed: bool


Use = Matrices | str
"""How a parameter is used; a text says why that is unclear."""

_known: WeakKeyDictionary[nn.Module, dict[str, Use]] = WeakKeyDictionary()


class StandIn(nn.Module):
    """Takes a block's place among the blocks and hands what it is given to a function."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        """Take the block and what is called as `call(hidden, args, kwargs)`."""
        super().__init__()
        # Hidden from nn.Module, so that the model does not see the block twice.
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "call", call)

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of their blocks (attention_type, layer_type).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return object.__getattribute__(self, "call")(hidden, args, kwargs)


def text_model(model: PreTrainedModel, blocks: nn.ModuleList) -> PreTrainedModel:
    """Return the innermost transformers model around the decoder blocks: it takes tokens, and has no head."""
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(x is blocks for x in m.modules())]
    return around[-1]


def parameter_uses(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList) -> Mapping[str, Use]:
    """Return how the blocks use those parameters that are no linear's; one that is in no product is not listed.

    Args:
        model: a model or skeleton; nothing of it is read but shapes.
        prefix: the name of the blocks in it.
        blocks: its decoder blocks.
    """
    if model not in _known:
        alike: dict[Any, list[int]] = {}
        for index, block in enumerate(blocks):
            modules = [(name, type(m).__name__) for name, m in block.named_modules()]
            shapes = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
            alike.setdefault((*modules, *shapes), []).append(index)
        # The first block of a kind stands for all of it.
        uses = _watch_blocks(model, blocks, {indices[0]: indices for indices in alike.values()})
        _known[model] = {
            f"{prefix}.{index}.{name}": use
            for indices in alike.values()
            for index in indices
            for name, use in uses.get(indices[0], {}).items()
        }
    return _known[model]


def _candidates(block: nn.Module) -> list[str]:
    """Return the names of the parameters that may be matrices, and whose module's class does not say so."""
    return [
        f"{name}.{parameter}".lstrip(".")
        for name, module in block.named_modules()
        if not isinstance(module, _OF_KNOWN_USE)
        for parameter, value in module.named_parameters(recurse=False)
        if sum(size > 1 for size in value.shape) > 1
    ]


class _Seen(Exception):
    """Ends a forward of which no more is needed."""


@torch.no_grad()
def _watch_blocks(
    model: PreTrainedModel, blocks: nn.ModuleList, kinds: dict[int, list[int]]
) -> dict[int, dict[str, Use]]:
    """Return the uses by block and parameter name, for the first block of each kind."""
    wanted = {index for index in kinds if _candidates(blocks[index])}
    if not wanted:
        return {}
    found: dict[int, dict[str, Use]] = {}
    first_of = {index: first for first, indices in kinds.items() for index in indices}
    outputs: dict[int, Any] = {}

    def run(index: int, block: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
        if first_of[index] not in outputs:
            values = {name: _zeros(value) for name, value in block.named_parameters()}
            watch = _Watch({name: values[name] for name in _candidates(block)})
            with watch:
                outputs[index] = functional_call(block, values, (hidden, *args), kwargs)
            found[index] = watch.uses()
            if wanted <= found.keys():
                raise _Seen
        return outputs[first_of[index]]

    whole = list(blocks)
    try:
        for index, block in enumerate(whole):
            blocks[index] = StandIn(block, lambda *given, i=index, b=block: run(i, b, *given))
        body = text_model(model, blocks)
        outside = {name: _zeros(value) for name, value in body.named_parameters()}
        tokens = torch.zeros(1, 2, dtype=torch.long)
        with _one_by_one(model):
            functional_call(body, outside, kwargs={"input_ids": tokens, "use_cache": False})
        reason = "its block was not run"
    except _Seen:
        reason = ""
    except Exception as error:  # whatever a model's own code may raise on a machine that lacks what it needs
        reason = f"its block cannot be run here ({type(error).__name__}: {str(error).splitlines()[0]})"
    finally:
        for index, block in enumerate(whole):
            blocks[index] = block
    return {i: found[i] if i in found else dict.fromkeys(_candidates(blocks[i]), reason) for i in wanted}


@contextmanager
def _one_by_one(model: PreTrainedModel) -> Iterator[None]:
    """Have experts multiplied one by one, as calibration does."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Return zeros of a shape and dtype that take no memory while they are only read."""
    size = like.numel() * like.element_size()
    if size < mmap.PAGESIZE:
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(like.dtype).view(like.shape)


class _Watch(TorchFunctionMode):
    """Notes in which products parameters take part; follows them through views and copies, up to the first activation.

    Args:
        parameters: contiguous tensors by name, each with a storage of its own.
    """

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._parameters = parameters
        self._views = {value.untyped_storage().data_ptr(): name for name, value in parameters.items()}
        self._copies = WeakIdKeyDictionary()
        self._used: set[str] = set()
        self._found: dict[str, set[Use]] = {}

    def uses(self) -> dict[str, Use]:
        """Return what was seen; a parameter that met activations in no product is not listed."""
        seen: dict[str, Use] = {}
        for name in self._parameters:
            found = self._found.get(name, set())
            if len(found) == 1:
                seen[name] = next(iter(found))
            elif found:
                seen[name] = next((use for use in found if isinstance(use, str)), "it is used in more than one way")
            elif name not in self._used:
                seen[name] = "it was not seen used"
        return seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in _flat((*args, *(kwargs or {}).values())) if isinstance(x, torch.Tensor)]
        owners = {name for x in given if (name := self._owner(x)) is not None}
        result = func(*args, **(kwargs or {}))
        if not owners:
            return result
        if any(x.is_floating_point() and x.ndim > 0 and self._owner(x) is None for x in given):
            self._used |= owners
            for product in products(func, args, kwargs):
                self._note(product)
            if getattr(func, "__name__", "") in _UNFOLLOWED:
                for name in owners:
                    self._add(name, f"it goes through {func.__name__}")
        else:
            # Nothing but the parameter went in: what comes out is a view of it, or a copy.
            for x in _flat((result,)):
                if isinstance(x, torch.Tensor) and self._owner(x) is None:
                    self._copies[x] = min(owners)
        return result

    def _owner(self, x: torch.Tensor) -> str | None:
        """Return the parameter that a tensor is a view or a copy of."""
        copied: str | None = self._copies.get(x)
        if copied is None and x.layout is torch.strided and not x.is_meta:
            return self._views.get(x.untyped_storage().data_ptr())
        return copied

    def _add(self, name: str, use: Use) -> None:
        self._found.setdefault(name, set()).add(use)

    def _note(self, product: Product) -> None:
        name = self._owner(product.operand)
        if name is None or self._owner(product.source) is not None:
            return
        if product.operand in self._copies:
            self._add(name, "it is multiplied as a copy")
        elif product.weight is None:
            self._add(name, "its product has no single axis of inputs")
        else:
            self._add(name, _lie(self._parameters[name], product.weight))


def _flat(values: Any) -> Iterator[Any]:
    return chain.from_iterable(x if isinstance(x, tuple | list) else (x,) for x in values)


def _lie(parameter: torch.Tensor, weight: torch.Tensor) -> Use:
    """Return how a weight [O, I] or [E, O, I], a view of a parameter, and those like it lie in the parameter."""
    shape, strides = parameter.shape, parameter.stride()
    if parameter.ndim not in (2, 3):
        return f"it has {parameter.ndim} axes"
    axes = [next((k for k, s in enumerate(strides) if s == x and shape[k] > 1), None) for x in weight.stride()[-2:]]
    rows, columns = parameter.ndim - 2, parameter.ndim - 1
    if set(axes) != {rows, columns}:
        return "its matrices do not lie along its last axes"
    transposed = axes[0] == columns
    tall, wide = reversed(weight.shape[-2:]) if transposed else weight.shape[-2:]
    if wide != shape[columns]:
        return "its matrices are part of its columns"
    if parameter.ndim == 3:
        if tall != shape[rows] or (weight.ndim == 3 and weight.stride(0) != strides[0]):
            return "its matrices are part of its rows"
        return Matrices(shape[0], parts=False, transposed=transposed)
    if tall == shape[0] and weight.ndim == 2:
        return Matrices(None, parts=False, transposed=transposed)
    step = tall * strides[0]
    aligned = weight.stride(0) == step if weight.ndim == 3 else weight.storage_offset() % step == 0
    if shape[0] % tall or not aligned:
        return "its matrices are unequal parts of its rows"
    return Matrices(shape[0] // tall, parts=True, transposed=transposed)
