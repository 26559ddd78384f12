"""Packed rows: several examples a row, separated by position ids that restart at every example.

No attention mask is passed; transformers then builds a block-diagonal one. :mod:`sqft.training.isolation` checks before
training that the model supports this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sqft.errors import Problems

if TYPE_CHECKING:
    from collections.abc import Iterable


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
        length: tokens of a packed row.
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
    """Pack whole examples into rows of at most `length` tokens (best fit decreasing), with their `seq_lengths`."""
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
    """Pad rows to the longest; padding counts as a further example without labels, and is not `real`."""
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
    real = torch.arange(width) < torch.tensor([[len(row["input_ids"])] for row in rows])
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "real": real}
