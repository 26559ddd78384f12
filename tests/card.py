"""A stand-in for a CUDA card, on machines that have none: tensors of it report `cuda:0` and compute on the CPU.

It finds what a card would refuse: an operation on tensors of both devices, or a result that is written into a tensor of
the other. It does not find what is a card's own: kernels, streams, rounding, memory. A number without dimensions may be
on either, as with PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
FREE = 8 << 30


_WHOLE = (torch.nn.functional.scaled_dot_product_attention, torch.where)
"""What would make a tensor on the meta device on its way."""


class WrongDevice(RuntimeError):
    """What PyTorch says with "Expected all tensors to be on the same device"."""


class OnCard(torch.Tensor):
    """A tensor of the card; `held` is where its values are."""

    held: torch.Tensor
    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        # On the meta device underneath: PyTorch for CPUs has no guard for cuda, which indexing asks for.
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip
        made.held = held
        return made

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, OnCard) or value.shape != self.shape:
            raise WrongDevice(f"data of a tensor {list(self.shape)} on {CARD}")
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.held!r})"

    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE:
            _check(func.__name__, tree_leaves((args, kwargs)))
            return OnCard(func(*tree_map(_inside, args), **tree_map(_inside, kwargs or {})))
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # by default what comes back to the CPU would count as on the card
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Card(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name, device = func._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
    if device is not None:
        to_card = torch.device(device).type == "cuda"
    elif name == "aten::copy_":
        to_card = isinstance(args[0], OnCard)
    else:
        to_card = on_card
        written = [a.name for a in func._schema.arguments if a.is_out]
        _check(name, tensors, [kwargs[key] for key in written if key in kwargs])
    result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnCard)}
    return tree_map(lambda leaf: _outside(leaf, known, to_card), result)


def _check(name: str, leaves: list[Any], written: Sequence[Any] = ()) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnCard)]
    for tensor in elsewhere if len(elsewhere) < len(tensors) else ():
        if tensor.dim() or any(tensor is out for out in written):
            raise WrongDevice(f"{name}: a tensor {list(tensor.shape)} on {tensor.device} beside one on {CARD}")


def _inside(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    return leaf.held if isinstance(leaf, OnCard) else leaf


def _outside(leaf: Any, known: dict[int, OnCard], to_card: bool) -> Any:
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, OnCard) or not to_card:
        return leaf
    return known[id(leaf)] if id(leaf) in known else OnCard(leaf)


@contextmanager
def card(free: int = FREE) -> Iterator[None]:
    """Let PyTorch have a card of so many free bytes inside the block."""
    with (
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.mem_get_info", return_value=(free, free)),
        mock.patch("sqft.core.columns.kernel_on", return_value=None),
        mock.patch("sqft.core.delta.kernels_on", return_value=None),
        _Card(),
    ):
        yield
