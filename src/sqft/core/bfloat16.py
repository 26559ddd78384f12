"""bfloat16 products on a CPU that has no instructions for them: computed in float32, rounded once at the end.

x86 processors without AMX or AVX-512 BF16, most desktops among them, take about four times as long for a bfloat16
product of many rows as for the float32 one (docs/decisions.md). Both add in float32 and round the sum, so the values
differ by the order of additions alone. Weights stay in bfloat16: a product's factors are converted, one product at a
time. Evaluation and calibration use this, for they judge what the model computes in bfloat16; training has
:mod:`sqft.adapters.float32`.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LEAST_ROWS = 16
"""Rows of a product from which converting the other factor pays."""
_aten = torch.ops.aten
# Each product's two factors among its arguments.
_FACTORS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}


def fast_products(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a model's bfloat16 products are as fast as the processor allows.

    It does nothing for models of another dtype or device, and on processors that multiply bfloat16 themselves.
    """
    weight = next(iter(model.parameters()), None)
    slow = weight is not None and weight.device.type == "cpu" and not multiplies_bfloat16()
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return _InFloat32() if slow and torch.bfloat16 in floats else nullcontext()


def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16 products; of what is no x86 that is assumed."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: True)() for name in tests)


class _InFloat32(TorchDispatchMode):
    """Below autograd, so that forward and backward products are both seen, and nothing is saved in float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.bmm.default and args[1].shape[0] > 1 and args[1].stride(0) == 0:
            # One weight for all of the batch. PyTorch spells it so where the weight is frozen and rows are not
            # neighbours, as those of a head that reads some tokens: many products, of few rows each.
            rows = self.__torch_dispatch__(_aten.mm.default, types, (args[0].flatten(0, 1), args[1][0]))
            return rows.unflatten(0, args[0].shape[:2])
        places = _FACTORS.get(func)
        if places is None or not _worthwhile(args[places[0]], args[places[1]]):
            return func(*args, **(kwargs or {}))
        given = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        return func(*given, **(kwargs or {})).to(torch.bfloat16)


def _worthwhile(left: torch.Tensor, right: torch.Tensor) -> bool:
    bfloat16 = left.dtype == right.dtype == torch.bfloat16
    return bfloat16 and left.device.type == "cpu" and left.shape[-2] >= LEAST_ROWS and right.shape[-1] >= LEAST_ROWS
