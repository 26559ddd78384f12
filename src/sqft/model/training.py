"""What a training step on packed rows needs beyond transformers' Trainer: packing, isolation, and a loss over answers.

Rows hold several examples. They stay apart because no attention mask is passed and position ids restart at every
example; transformers then builds a block-diagonal mask. A model that does not honour this is found by
:func:`check_isolation` before training, numerically, on the model itself.

The language-model head runs only on positions whose next token is trained on: a pre-hook on it selects them, so any
architecture's own post-processing of logits (soft-caps, scaling) still applies. On prompts and padding the logits of a
50,000-word vocabulary would be the step's largest tensor, for nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer

from sqft.errors import InputError, Problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqft.model.loss_scale import LossScale

IGNORED = -100


def label_examples(
    examples: Iterable[tuple[list[int], list[int]]],
    end: int,
    *,
    length: int,
    model_length: int | None,
    completion_only: bool,
) -> list[dict[str, list[int]]]:
    """Turn (prompt tokens, answer tokens) into input_ids and labels, with the end token after the answer.

    Args:
        examples: token ids of prompts and answers.
        end: id of the end token.
        length: tokens a packed row holds.
        model_length: tokens the model allows, or None.
        completion_only: label the answer only.

    Raises:
        InputError: no examples, or some are longer than a row or the model; how many and how long.
    """
    rows, too_long = [], []
    for prompt, answer in examples:
        ids = [*prompt, *answer] if answer[-1:] == [end] else [*prompt, *answer, end]
        split = len(prompt) if completion_only else 1
        if len(ids) > length:
            too_long.append(len(ids))
        rows.append({"input_ids": ids, "labels": [IGNORED] * split + ids[split:]})
    with Problems("finetune") as problems:
        if model_length is not None and length > model_length:
            problems.add(f"finetune.length is {length} tokens, more than the {model_length} that the model allows")
        if not rows:
            problems.add("there are no training examples")
        if too_long:
            problems.add(
                f"{len(too_long)} of {len(rows)} examples are longer than a row of {length} tokens (the longest has "
                f"{max(too_long)}); raise finetune.length or shorten them: cutting would drop the answer's end"
            )
    return rows


def pack_rows(rows: list[dict[str, list[int]]], length: int, *, packing: bool) -> list[dict[str, list[int]]]:
    """Put whole examples together into rows of at most `length` tokens, best fit decreasing; each keeps its lengths."""
    if not packing:
        return [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows]
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from trl.data_utils import pack_dataset

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        packed = pack_dataset(Dataset.from_list(rows), length, strategy="bfd")
        return [dict(row) for row in packed]
    finally:
        if shown:
            enable_progress_bar()


def collate(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows to their longest; padding is one more example of its own, never trained on."""
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        used = len(row["input_ids"])
        input_ids[index, :used] = torch.tensor(row["input_ids"])
        labels[index, :used] = torch.tensor(row["labels"])
        lengths = [*row["seq_lengths"], width - used]
        position_ids[index] = torch.cat([torch.arange(n) for n in lengths])
        # The first token of an example is not predicted from the example before it.
        starts = torch.tensor(lengths).cumsum(0)[:-1]
        labels[index, 0] = IGNORED
        labels[index, starts[starts < width]] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


@contextmanager
def head_on(model: nn.Module, selected: torch.Tensor) -> Any:
    """Run the language-model head on the selected positions only.

    Args:
        model: a causal language model, with or without adapters, or what shares it among processes.
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
        num_items: what the sum is divided by (all labelled tokens of an optimiser step); None is this batch's.
        amplify: makes the logits float32; :meth:`sqft.model.loss_scale.LossScale.amplify` in training.
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
        """Take the loss scale beside what Trainer takes."""
        super().__init__(*args, **options)
        self.loss_scale = loss_scale

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; there are no outputs to return, since most logits are never made."""
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


@torch.no_grad()
def check_isolation(model: PreTrainedModel, vocabulary: int) -> None:
    """Refuse packing on a model that lets packed examples see each other.

    Two random examples are run packed and alone; their last hidden states must agree to rounding.

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
    # Changing the first example must not move the second, and being packed must not either, beyond rounding.
    leak = (packed - blind).abs().mean() / scale
    moved = (packed - alone).abs().mean() / scale
    if leak > 1e-3 or moved > 0.05:
        raise InputError(
            f"{type(model).__name__} does not keep packed examples apart (the second moves by "
            f"{100 * float(moved):.1f} % when another stands before it); set finetune.packing: false"
        )
