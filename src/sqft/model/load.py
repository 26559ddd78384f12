"""Opening a model: by transformers, or with its integers packed in memory; it knows no adapters."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqft.core.grid import storage_bits
from sqft.errors import InputError
from sqft.kernels import decode
from sqft.model.opening import check_blocks, check_complete, hide_bars_of_compressed_tensors, load_config, reading
from sqft.model.packed import PackedLinear
from sqft.storage.checkpoint import Checkpoint, plain_files
from sqft.storage.integers import parse_scheme, quantization_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sqft.model.archived import Archived


def open_model(
    folder: str | Path,
    *,
    packed: bool = False,
    in_place: bool = False,
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
        in_place: keep an archive's linears in its layout, where the kernel for decoding multiplies them; not to train.
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
    archived = _in_place(folder, options) if in_place and checkpoint.archived and not packed else None
    without = () if archived is None else archived.without
    with plain_files(folder, without) as place, reading(f"model {folder}: does not load"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    # transformers fills them with random values and goes on.
    model: PreTrainedModel = loaded[0]
    found = loaded[1]
    check_complete(folder, [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if archived is not None:
        archived.fill(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.folder = folder  # of an archive, transformers has read a copy
    model.name_or_path = str(folder)
    model.eval()
    return model


def _in_place(folder: str | Path, options: dict[str, Any]) -> Archived | None:
    """Return the linears of an archive that stay as they are, None where there are none, and let transformers know."""
    from sqft.model.archived import Archived
    from sqft.model.quantizer import ArchivedConfig

    if not decode.available():
        return None
    trust_remote_code = options["trust_remote_code"]
    archived = Archived(folder, trust_remote_code=trust_remote_code)
    if not archived.linears:
        return None
    config = load_config(folder, trust_remote_code=trust_remote_code)
    config.quantization_config = ArchivedConfig(list(archived.linears.values()), archived.rest).to_dict()
    options["config"] = config
    return archived


def decodes_packed(folder: str | Path) -> bool:
    """Return whether a quantised folder, opened packed, has linears that the kernel for decoding multiplies."""
    stored = quantization_config(folder)
    if stored is None or Checkpoint(folder).archived or not decode.available():
        return False
    with suppress(InputError):  # stored as transformers reads it and we do not
        return storage_bits(parse_scheme(stored, str(folder)).bits) == 4
    return False


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model has an embedding for."""
    return int(cast("Any", model).get_input_embeddings().weight.shape[0])
