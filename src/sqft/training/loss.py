"""The loss over answers of packed rows, and transformers' Trainer with it.

The language-model head runs only on positions whose next token is trained on: a pre-hook on it selects them, so any
architecture's own post-processing of logits (soft-caps, scaling) still applies. Logits of prompts and padding are not
needed, and with a vocabulary of 50,000 they would be the step's largest tensor. :mod:`sqft.training.distill` adds what
is learnt from a teacher.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional
from transformers import Trainer

from sqft.training.batches import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqft.training.distill import Distillation
    from sqft.training.loss_scale import LossScale


PARTS = ("task_loss", "hidden", "logits")
"""What the log calls the parts of a distilled loss."""


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


def next_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what each position is to predict, int64 [rows, tokens]; IGNORED where nothing is trained on."""
    return functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)


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
    targets = next_tokens(inputs)
    selected = targets != IGNORED
    with head_on(model, selected):
        output = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    total = functional.cross_entropy(amplify(output.logits[0]), targets[selected], reduction="sum")
    return total / (selected.sum() if num_items is None else num_items)


class PackedTrainer(Trainer):
    """transformers' Trainer with the loss over answers of packed rows, scaled where the model is float16.

    With a distillation the log of each step has its parts beside the loss, unweighted: `task_loss`, `hidden`, `logits`.
    """

    def __init__(
        self, *args: Any, loss_scale: LossScale, distillation: Distillation | None = None, **options: Any
    ) -> None:
        """Take Trainer's arguments, the loss scale, and what is learnt from a teacher."""
        super().__init__(*args, **options)
        self.loss_scale, self.distillation = loss_scale, distillation
        if distillation is not None:
            self.model_accepts_loss_kwargs = True  # a step's counts divide, whatever the model's own forward takes
        self._step_tokens: torch.Tensor | None = None
        self._parts: torch.Tensor | None = None

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """Return the micro-batches of a step and their labelled tokens, and note how many tokens are no padding."""
        batches, labelled = super().get_batch_samples(*args, **options)
        if self.distillation is not None:
            own = torch.stack([batch["real"].sum() for batch in batches]).sum().to(self.args.device)
            self._step_tokens = self.accelerator.gather(own).sum()
        return batches, labelled

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; outputs are empty, since most logits are never computed."""
        if self.distillation is None:
            loss = answer_loss(model, inputs, num_items_in_batch, self.loss_scale.amplify)
        else:
            counts = num_items_in_batch, self._step_tokens
            found = self.distillation.losses(model, inputs, *counts, self.loss_scale.amplify)
            loss = self.distillation.weigh(found)
            self._parts = found.detach() if self._parts is None else self._parts + found.detach()
        if num_items_in_batch is not None:
            # Each process has the sum over its rows, divided by the labelled tokens of all; gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with the parts of a distilled step's loss."""
        if self._parts is not None and "loss" in logs:
            parts = cast("torch.Tensor", self.accelerator.reduce(self._parts, "sum")).tolist()
            logs = {**logs, **dict(zip(PARTS, parts, strict=True))}
            self._parts = None
        super().log(logs, *args, **options)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the validation loss of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return answer_loss(model, inputs).detach(), None, None
