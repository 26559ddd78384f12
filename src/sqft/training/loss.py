"""The loss over answers of packed rows, and transformers' Trainer with it.

The language-model head runs only on positions whose next token is trained on: a pre-hook on it selects them, so any
architecture's own post-processing of logits (soft-caps, scaling) still applies. Logits of prompts and padding are not
needed, and with a vocabulary of 50,000 they would be the step's largest tensor.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional
from transformers import Trainer

from sqft.training.batches import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqft.training.loss_scale import LossScale


@contextmanager
def head_on(model: nn.Module, selected: torch.Tensor) -> Any:
    """Run the language-model head on the selected positions only.

    Args:
        model: a causal language model, with or without adapters or a wrapper for distributed training.
        selected: bool [rows, tokens].
    """
    whole: Any = extract_model_from_parallel(model)
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    head = base.get_output_embeddings()

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][selected].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def answer_loss(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    num_items: torch.Tensor | int | None = None,
    amplify: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
) -> torch.Tensor:
    """Return the mean negative log-likelihood, in nats, of the labelled tokens.

    Args:
        model: a causal language model.
        inputs: input_ids, labels and position_ids, [rows, tokens].
        num_items: divisor of the sum (all labelled tokens of an optimiser step); None is those of this batch.
        amplify: casts the logits to float32; :meth:`sqft.training.loss_scale.LossScale.amplify` in training.
    """
    targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    selected = targets != IGNORED
    with head_on(model, selected):
        output = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    total = functional.cross_entropy(amplify(output.logits[0]), targets[selected], reduction="sum")
    return total / (selected.sum() if num_items is None else num_items)


class PackedTrainer(Trainer):
    """transformers' Trainer with the loss over answers of packed rows, scaled where the model is float16."""

    def __init__(self, *args: Any, loss_scale: LossScale, **options: Any) -> None:
        """Take Trainer's arguments and the loss scale."""
        super().__init__(*args, **options)
        self.loss_scale = loss_scale

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; outputs are empty, since most logits are never computed."""
        loss = answer_loss(model, inputs, num_items_in_batch, self.loss_scale.amplify)
        if num_items_in_batch is not None:
            # Each process has the sum over its rows, divided by the labelled tokens of all; gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the validation loss of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return answer_loss(model, inputs).detach(), None, None
