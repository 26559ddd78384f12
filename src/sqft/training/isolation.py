"""A numerical test, before training, that packed examples do not attend to each other in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sqft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def check_isolation(model: PreTrainedModel, vocabulary: int) -> None:
    """Check that packed examples do not attend to each other.

    Two random examples run packed and alone; their last hidden states must agree up to rounding.

    Raises:
        InputError: they do not.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 9)
    parts = [torch.randint(vocabulary, (1, n), generator=generator) for n in lengths]
    positions = [torch.arange(n).unsqueeze(0) for n in lengths]
    was_training = model.training
    model.eval()

    def hidden(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        device = model.device
        out = model(
            input_ids=ids.to(device), position_ids=position_ids.to(device), use_cache=False, output_hidden_states=True
        )
        state: torch.Tensor = out.hidden_states[-1].float()
        return state

    try:
        packed = hidden(torch.cat(parts, 1), torch.cat(positions, 1))[:, lengths[0] :]
        alone = hidden(parts[1], positions[1])
        blind = hidden(torch.cat([parts[0].flip(1), parts[1]], 1), torch.cat(positions, 1))[:, lengths[0] :]
    finally:
        model.train(was_training)
    scale = alone.abs().mean().clamp(min=1e-6)
    # Neither changing the first example nor packing may change the second, except by rounding.
    leak = (packed - blind).abs().mean() / scale
    moved = (packed - alone).abs().mean() / scale
    if leak > 1e-3 or moved > 0.05:
        raise InputError(
            f"{type(model).__name__} does not keep packed examples apart (the second moves by "
            f"{100 * float(moved):.1f} % when another stands before it); set finetune.packing: false"
        )
