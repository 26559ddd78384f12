"""Opening a model: by transformers, or with its integers packed in memory; it knows no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqft.model.opening import check_blocks, check_complete, hide_bars_of_compressed_tensors, reading
from sqft.model.packed import PackedLinear
from sqft.storage.checkpoint import Checkpoint, plain_files
from sqft.storage.integers import quantization_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def open_model(
    folder: str | Path,
    *,
    packed: bool = False,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a model folder's causal language model in evaluation mode.

    A quantised folder is opened by transformers, which decompresses it: what any user of the folder gets. With `packed`
    its weights stay packed in memory, frozen; so do those of GPTQ folders, which transformers cannot open on its own.
    transformers reads plain files alone: for it, an archive is unpacked into a temporary folder.

    Args:
        folder: model folder, or an archive.
        packed: keep quantised weights packed.
        dtype: of its weights and arithmetic; None is the one in which it is stored.
        attention: attention implementation; None leaves transformers' choice.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the folder does not load.
    """
    from transformers import AutoModelForCausalLM

    stored = quantization_config(folder)
    checkpoint = Checkpoint(folder)
    check_blocks(folder, len(checkpoint.entries))
    # Not "auto", which takes the dtype that config.json names: merging adds to the weights as they are stored.
    options: dict[str, Any] = {"dtype": dtype or checkpoint.dtype, "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    if stored is not None and (packed or stored.get("quant_method") == "gptq"):
        from sqft.model.quantizer import packed_config

        options["config"] = packed_config(folder, trust_remote_code=trust_remote_code)
    elif stored is not None:
        hide_bars_of_compressed_tensors()
    with plain_files(folder) as place, reading(f"model {folder}: does not load"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    # transformers fills them with random values and goes on.
    model: PreTrainedModel = loaded[0]
    found = loaded[1]
    check_complete(folder, [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.folder = folder  # of an archive, transformers has read a copy
    model.name_or_path = str(folder)
    model.eval()
    return model


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model has an embedding for."""
    return int(cast("Any", model).get_input_embeddings().weight.shape[0])
