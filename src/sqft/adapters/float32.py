"""Training in float32 on a CPU that has no instructions for bfloat16.

Such a processor emulates bfloat16, and a step then spends more time in conversions and emulated sums than in matrix
products. In float32 a step of SmolLM2-135M takes 0.6 to 0.7 of the time (`benchmarks/training.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from sqft.adapters.masked import SqftMaskedLinear
from sqft.core.bfloat16 import multiplies_bfloat16


def compute_in_float32(model: nn.Module) -> bool:
    """Convert a bfloat16 model on a CPU to float32, where that is faster; return whether it was converted.

    Weights that a masked or quantised adapter changes stay as they are: W' and Ŵ' are rounded to their dtype, so that
    what is trained is what is merged. All others take twice their memory, packed ones excepted.

    Args:
        model: with its adapters, if any; to be used for training alone.
    """
    frozen = [p for p in model.parameters() if p.dtype == torch.bfloat16 and p.device.type == "cpu"]
    if not frozen or multiplies_bfloat16():
        return False
    adapted = {id(p) for m in model.modules() if isinstance(m, SqftMaskedLinear) for p in m.base_layer.parameters()}
    for parameter in frozen:
        if id(parameter) not in adapted:
            parameter.data = parameter.data.float()
    return True
