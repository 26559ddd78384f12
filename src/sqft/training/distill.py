"""Distillation: what a compressed model learns from the uncompressed one, its teacher, beside the loss over answers.

Over one optimiser step with N tokens that are no padding (prompts included), n labelled tokens, L blocks, student S and
teacher T:

    loss = task + hidden · 1/(L·N) · Σ_blocks Σ_tokens ‖S − T‖² / ‖T‖²  +  logits · 1/n · Σ_labelled KL(p_T ‖ p_S)

S and T are the states after each block, the last one after the final norm, as transformers returns them. KL is in nats,
at temperature 1, over the tokens that the task's loss is over. N and n are those of the whole step, so each term is a
sum over tokens that does not depend on how micro-batches and processes share them.

Differs from SquareHead (Kurtic et al. 2023, arXiv 2310.06927), whose norms are over all tokens of a batch: a mean of
ratios token by token is additive, and a few tokens of huge norm do not outweigh the rest.

The teacher sees the student's packed rows by the same attention, without gradients and in evaluation mode. It is no
part of the trained model: neither checkpoints nor the optimiser know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sqft.training.batches import IGNORED
from sqft.training.loss import head_on, next_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedModel

_LEAST_NORM = 1e-6
"""Of a squared norm that is divided by."""


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher, and how much is learnt from it.

    Attributes:
        teacher: the uncompressed model, on the student's device.
        hidden: weight of the hidden states' error.
        logits: weight of the logits' divergence.
    """

    teacher: PreTrainedModel
    hidden: float
    logits: float

    def losses(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        labelled: torch.Tensor | int | None = None,
        tokens: torch.Tensor | int | None = None,
        amplify: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    ) -> torch.Tensor:
        """Return the task's loss, the error of the hidden states, and the divergence of the logits, float32 [3].

        A part whose weight is 0 is not computed and is 0.

        Args:
            model: the student.
            inputs: input_ids, labels, position_ids and real, [rows, tokens].
            labelled: divisor of task and divergence; None is the labelled tokens of this batch.
            tokens: divisor of the error; None is this batch's tokens that are no padding.
            amplify: casts to float32; :meth:`sqft.training.loss_scale.LossScale.amplify` in training.
        """
        targets = next_tokens(inputs)
        selected = targets != IGNORED
        with torch.no_grad():  # the teacher's head runs only where its logits are used
            taught = self._forward(self.teacher, inputs, selected if self.logits else torch.zeros_like(selected))
        output = self._forward(model, inputs, selected)
        log_probs = functional.log_softmax(amplify(output.logits[0]), dim=-1)
        labelled = selected.sum() if labelled is None else labelled
        task = functional.nll_loss(log_probs, targets[selected], reduction="sum") / labelled
        error = divergence = torch.zeros_like(task)
        if self.hidden:
            states = list(zip(output.hidden_states[1:], taught.hidden_states[1:], strict=True))
            total = torch.stack([relative_error(student, teacher, inputs["real"]) for student, teacher in states]).sum()
            error = amplify(total) / (len(states) * (inputs["real"].sum() if tokens is None else tokens))
        if self.logits:
            wanted = functional.log_softmax(taught.logits[0].float(), dim=-1)
            divergence = functional.kl_div(log_probs, wanted, reduction="sum", log_target=True) / labelled
        return torch.stack([task, error, divergence])

    def weigh(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the loss that is trained on, of the parts that :meth:`losses` returns."""
        return losses[0] + self.hidden * losses[1] + self.logits * losses[2]

    def _forward(self, model: nn.Module, inputs: dict[str, torch.Tensor], selected: torch.Tensor) -> Any:
        """Return a model's output, with logits at the selected positions."""
        with head_on(model, selected):
            return model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                use_cache=False,
                output_hidden_states=bool(self.hidden),
            )


def relative_error(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return Σ ‖S − T‖² / ‖T‖² over the tokens that are no padding, in float32.

    Args:
        student: [rows, tokens, hidden].
        teacher: the same shape, in any float dtype; no gradient flows to it.
        real: bool [rows, tokens], False = padding.
    """
    error: torch.Tensor = _RelativeError.apply(student, teacher, real)
    return error


class _RelativeError(torch.autograd.Function):
    """Saves the states as they are: autograd would keep their difference in float32, block by block."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        wanted = teacher.float()
        share = real / wanted.square().sum(-1).clamp_min(_LEAST_NORM)
        ctx.save_for_backward(student, teacher, share)
        return ((student.float() - wanted).square().sum(-1) * share).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student, teacher, share = ctx.saved_tensors
        towards = (student.float() - teacher.float()) * (2 * gradient * share).unsqueeze(-1)
        return towards.to(student.dtype), None, None
