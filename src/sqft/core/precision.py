"""IEEE float32 products, whatever a process has allowed its float32 products to round to.

`torch.set_float32_matmul_precision("medium")`, `TrainingArguments(tf32=True)` and their kin are settings of the whole
process. They let a float32 product round its factors to TF32 or bfloat16, and so would move a weight by more than what
training stores. W' is computed alike in training, merge and verify only if its product ignores them.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_BACKENDS = {"cpu": "mkldnn", "xpu": "mkldnn", "cuda": "cuda"}
_EXACT = ("none", "ieee")
_LOCK = threading.Lock()
_INSIDE = dict.fromkeys(_BACKENDS.values(), 0)
_FOUND: dict[str, str] = {}


@contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices on a device in float32 inside the block; the user's setting is back after it.

    The setting is the process's, so threads share the block: the first one in sets it, the last one out restores it.
    A setting that is made meanwhile is kept. Where products are exact already, which is PyTorch's default, nothing is
    set. Costs a third of what switching autocast off does.
    """
    backend = _BACKENDS.get(device.type)
    if backend is None:
        yield
        return
    with _LOCK:
        _INSIDE[backend] += 1
        if (precision := _get(backend, "matmul")) not in _EXACT:
            # "none" follows the backend's setting. Put back as a value of its own, it would stop following.
            _FOUND[backend] = "none" if precision == _get(backend, "all") else precision
            _set(backend, "ieee")
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE[backend] -= 1
            if not _INSIDE[backend] and (found := _FOUND.pop(backend, None)) and _get(backend, "matmul") == "ieee":
                _set(backend, found)


def _get(backend: str, operation: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, operation))


def _set(backend: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, "matmul", precision)
