"""Adapters as PEFT itself merges them into a float model: DoRA, saved modules and trained biases too.

:mod:`sqft.adapters.merged` computes W + scaling · B A tensor by tensor, and refuses all else. What other tools train is
often more, and PEFT merges most of it. What it does merge is not listed here, where a list would be out of date, but
tried: on the model's skeleton, whose parameters hold no data, PEFT attaches, loads and merges the adapter as it will on
the model itself. That takes no time and no memory, and finds an adapter of another shape.

Merging is PEFT's `merge_and_unload`, in the model's own dtype: what users of the adapter have had.
"""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file

from sqft.adapters.attach import recorded_base
from sqft.adapters.config import PEFT_TYPE
from sqft.adapters.saved import CONFIG, WEIGHTS, check_settings
from sqft.core.mask import finite
from sqft.disk import read_json
from sqft.errors import InputError, Problems
from sqft.memory import is_out_of_memory
from sqft.model.load import open_model
from sqft.model.sources import is_hub_id
from sqft.model.targets import skeleton
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.identity import check_identity
from sqft.storage.integers import quantization_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import LoraConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ADAPTER = "default"  # PEFT's name for a model's first adapter


def check_mergeable(base: Path, adapter: Path, reference: str, *, trust_remote_code: bool = False) -> int:
    """Refuse an adapter that PEFT does not merge into a base, by trying it without data.

    Args:
        base: the folder of the float model.
        adapter: the adapter's folder.
        reference: what the recipe calls the base: a Hub id can be compared with the one that the adapter names.
        trust_remote_code: passed to transformers.

    Returns:
        How many modules the adapter changes.

    Raises:
        InputError: it is no LoRA, is damaged, is another base's, has another shape, or is not merged.
    """
    if quantization_config(base) is not None:
        raise InputError(f"model {base}: is quantised; an adapter is merged by PEFT into the float model alone")
    settings = _settings(adapter)
    adapted = _try_without_data(base, adapter, settings, trust_remote_code)
    _check_base(base, adapter, settings, reference, adapted)
    return len(adapted)


def merge_by_peft(base: Path, adapter: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the base with the adapter merged in by PEFT, in memory, in the dtype that the base is stored in.

    Raises:
        InputError: PEFT does not merge it.
    """
    with _peft(base, adapter):
        model: Any = PeftModel.from_pretrained(open_model(base, trust_remote_code=trust_remote_code), str(adapter))
        return cast("PreTrainedModel", model.merge_and_unload())


def _settings(adapter: Path) -> LoraConfig:
    """Return the adapter's settings as PEFT reads them, its tensors checked."""
    if not (adapter / CONFIG).is_file():
        raise InputError(f"adapter {adapter}: the folder has no {CONFIG}; give a PEFT adapter folder")
    values = read_json(adapter / CONFIG)
    kind = values.get("peft_type")
    with Problems(f"adapter {adapter}") as problems:
        if kind == PEFT_TYPE:
            problems.add(
                f"is of kind {values.get('kind')}, trained on a compressed base and exact on that alone; merge it "
                "into its base with sqft merge"
            )
        elif kind != "LORA":
            problems.add(f"its peft_type is {kind!r}; only LORA is taken")
    with Problems(f"adapter {adapter}") as problems:
        settings = check_settings(values, problems)
        if not (adapter / WEIGHTS).is_file():
            pickled = ", and the pickle adapter_model.bin runs code when it is opened"
            has = pickled if (adapter / "adapter_model.bin").is_file() else ""
            problems.add(f"has no {WEIGHTS}{has}; save it again with PEFT's save_pretrained")
        else:
            problems.extend(_not_finite(adapter / WEIGHTS))
    return settings


def _not_finite(file: Path) -> Iterator[str]:
    try:
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not finite(tensor.float()):
                wrong = int((~torch.isfinite(tensor)).sum())
                yield f"{name} has {wrong} NaN or Inf of {tensor.numel()} values; train it again"
    except (OSError, SafetensorError) as error:
        yield f"{file.name} cannot be read ({error})"


def _try_without_data(base: Path, adapter: Path, settings: LoraConfig, trust_remote_code: bool) -> list[str]:
    """Let PEFT attach, load and merge the adapter on the skeleton; return the names of the modules that it changes."""
    network = skeleton(base, trust_remote_code=trust_remote_code)
    before = {name: tensor.shape for name, tensor in network.state_dict().items()}
    tied = _embeddings_tied(network)
    settings = copy.deepcopy(settings)
    settings.init_lora_weights = True  # a start that rewrites the base needs its data, and leaves all shapes alone
    settings.inference_mode = True
    with _peft(base, adapter):
        model: Any = PeftModel(network, settings)
        loaded = model.load_adapter(str(adapter), _ADAPTER)
    changed = [name for name, m in model.named_modules() if isinstance(m, LoraLayer | ModulesToSaveWrapper)]
    with Problems(f"adapter {adapter} on base {base}") as problems:
        absent = [name for name in loaded.missing_keys if f".{_ADAPTER}" in name]
        for names, what in (
            (absent, "its settings adapt modules that it has no tensors of"),
            (loaded.unexpected_keys, "it has tensors that have no place in the model"),
        ):
            if names:
                problems.add(f"{what}: {len(names)}, {names[0]} among them; is it another model's?")
        ends = (network.get_input_embeddings(), network.get_output_embeddings())
        if tied and any(isinstance(module, LoraLayer | ModulesToSaveWrapper) for module in ends):
            problems.add(
                "it changes the embeddings or the output layer, which this model ties to each other: what it does to "
                "the one would happen to both; untie them in the base and train it again"
            )
    with _peft(base, adapter):
        merged = model.merge_and_unload()
    if {name: tensor.shape for name, tensor in merged.state_dict().items()} != before:
        raise InputError(
            f"adapter {adapter}: it makes a model of other parameters (layer_replication or the like), not a tuned "
            f"form of {base}; merge it with PEFT, and give the result as `model`"
        )
    return [name.removeprefix("base_model.model.") for name in changed]


def _embeddings_tied(network: PreTrainedModel) -> bool:
    given, made = cast("Any", network).get_input_embeddings(), cast("Any", network).get_output_embeddings()
    return made is not None and given.weight is made.weight


@contextmanager
def _peft(base: Path, adapter: Path) -> Iterator[None]:
    """Turn what PEFT raises about an adapter, of many classes, into one error that names it; hide its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        sizes = [line.replace(f".{_ADAPTER}", "") for line in lines if line.startswith("size mismatch")]
        said = f"{sizes[0]} ({len(sizes)} such tensors; is it another model's?)" if sizes else lines[0]
        raise InputError(f"adapter {adapter}: PEFT does not merge it into {base}: {said}") from error


def _check_base(base: Path, adapter: Path, settings: LoraConfig, reference: str, adapted: list[str]) -> None:
    """Refuse an adapter of another base, as far as that is recorded: by digest, by weights, or by name."""
    if (trained_on := recorded_base(adapter)) is not None:
        check_identity(base, trained_on, None, f"adapter {adapter}: ")
        return
    named = settings.base_model_name_or_path
    if not named:
        return
    if (Path(named) / "config.json").is_file():
        if (differing := _differing(base, Path(named), adapted)) is not None:
            raise InputError(
                f"adapter {adapter}: was trained on {named}, whose {differing} is not that of {base}; give that model"
            )
    elif is_hub_id(named) and is_hub_id(reference) and named.casefold() != reference.casefold():
        raise InputError(
            f"adapter {adapter}: was trained on {named}, and the recipe's model is {reference}; set model: {named}, or "
            f"where both have the same weights correct base_model_name_or_path in {CONFIG} of a copy of the adapter"
        )
    else:
        logger.info("adapter %s names its base %s; that it is %s cannot be seen", adapter.name, named, reference)


def _differing(base: Path, other: Path, adapted: list[str]) -> str | None:
    """Return an adapted weight in which two model folders differ, None where they agree to the base's dtype."""
    ours, theirs = Checkpoint(base), Checkpoint(other)
    for name in (f"{module}.weight" for module in adapted):
        if name in ours.entries and name in theirs.entries:
            weight, wanted = ours.read(name), theirs.read(name)
            if weight.shape != wanted.shape or not torch.equal(weight, wanted.to(weight.dtype)):
                return name
    return None
