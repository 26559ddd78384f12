"""Loss scaling for float16 models: a mean over thousands of tokens has gradients below float16's range.

The gradient is multiplied by the scale at the logits, and divided by it at each trained parameter, which is float32.
As in torch's GradScaler, a step whose gradients overflow is skipped and the scale halved; after 2,000 steps without
overflow it doubles. Two differences: the scale is saved in checkpoints, so that a resumed training takes the same
steps, and the learning-rate schedule also advances on a skipped step.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sqft.errors import NumericalError

logger = logging.getLogger(__name__)

_FIRST = 1024.0
_LARGEST = 65536.0
_GROWS_AFTER = 2000  # steps
_FILE = "loss_scale.json"


class LossScale(TrainerCallback):
    """Scales gradients inside a float16 model, and skips steps that overflow.

    Attributes:
        scale: factor of the gradients between logits and trained parameters; 1 if nothing is float16.
    """

    def __init__(self, model: nn.Module, *, float16: bool) -> None:
        """Register hooks that unscale the gradients of the model's trained parameters."""
        self.scale, self.good_steps, self._model, self._float16 = _FIRST if float16 else 1.0, 0, model, float16
        if float16:
            for parameter in self._trained():
                parameter.register_hook(lambda gradient: gradient / self.scale)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def amplify(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 logits whose gradient is multiplied by `scale` in the backward pass."""
        logits = logits.float()
        return logits if self.scale == 1.0 else _Amplified.apply(logits, self.scale)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop all gradients if one is not finite: the optimiser then changes neither parameters nor moments."""
        if not self._float16:
            return
        trained = self._trained()
        if all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in trained):
            self.good_steps += 1
            if self.good_steps >= _GROWS_AFTER and self.scale < _LARGEST:
                self.scale, self.good_steps = 2 * self.scale, 0
            return
        for parameter in trained:
            parameter.grad = None
        self.scale, self.good_steps = self.scale / 2, 0
        logger.warning("step %d: gradients overflow float16; skipped, scale now %g", state.global_step, self.scale)
        if self.scale < 2**-10:
            raise NumericalError(
                f"step {state.global_step}: gradients overflow float16 at every scale; store the model as bfloat16, or "
                "lower finetune.learning_rate"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the scale in a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._float16 and state.is_world_process_zero:
            (folder / _FILE).write_text(json.dumps({"scale": self.scale, "good_steps": self.good_steps}))

    def restore(self, checkpoint: Path) -> None:
        """Load the scale from a checkpoint."""
        if (checkpoint / _FILE).is_file():
            values = json.loads((checkpoint / _FILE).read_text())
            self.scale, self.good_steps = float(values["scale"]), int(values["good_steps"])


class _Amplified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.scale, None
