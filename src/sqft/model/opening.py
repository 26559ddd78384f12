"""What transformers opens of a folder besides the weights: config and tokenizer; its bars hidden, its errors named."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.disk import read_json
from sqft.errors import InputError, SqftError
from sqft.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' own progress bars; loading a block is not worth one."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def hide_bars_of_compressed_tensors() -> None:
    """Switch off the progress bars that every opening of an INT4 folder shows, at loading and at its first forward.

    Their own switch is one that transformers does not hand on.
    """
    import importlib

    for name in ("quantization.lifecycle.apply", "offload.dispatch", "compressors.model_compressors.model_compressor"):
        with suppress(ImportError):  # where another version has moved them, they show
            vars(importlib.import_module(f"compressed_tensors.{name}"))["tqdm"] = lambda items, **_options: items


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes transformers raise into an error that names the folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SqftError) or is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {str(error) or type(error).__name__}") from error


def load_config(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a model folder."""
    from transformers import AutoConfig

    read_json(Path(folder) / "config.json")
    with reading(f"model {folder}: its config cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, with a padding token."""
    from transformers import AutoTokenizer

    with reading(f"model {folder}: has no readable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_blocks(folder: str | Path, tensors: int) -> None:
    """Refuse a config that names more blocks than the folder has tensors: building them alone would take all memory.

    Args:
        folder: model folder.
        tensors: how many tensors it has.

    Raises:
        InputError: names the key and both numbers.
    """
    places = [("", read_json(Path(folder) / "config.json"))]
    for where, values in places:  # grows by what lies inside
        for key, value in values.items():
            if isinstance(value, dict):
                places.append((f"{where}{key}.", value))
            elif key in _BLOCK_COUNTS and isinstance(value, int) and value > tensors:
                raise InputError(
                    f"model {folder}: its config.json says {where}{key} {value}, and the folder has {tensors} tensors "
                    "in all; set it to what the weights have, or get the checkpoint again"
                )


def check_complete(folder: str | Path, missing: Iterable[str]) -> None:
    """Refuse a model folder without all of its weights.

    Raises:
        InputError: names those that are missing or have another shape.
    """
    names = sorted(missing)
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise InputError(f"model {folder}: lacks {listed}, or has them in another shape; get the checkpoint again")
