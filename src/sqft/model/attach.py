"""Put a saved adapter on the model of its base, after checking that it is its base."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig, PeftConfig, PeftModel

from sqft.artifact import MANIFEST, Artifact
from sqft.errors import InputError
from sqft.model.layers import SqftConfig
from sqft.model.load import read_json
from sqft.model.packed import PackedLinear
from sqft.model.stored import check_identity

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def attach_saved(
    model: PreTrainedModel, base: str | Path, adapter: str | Path, *, elastic: bool = False
) -> PreTrainedModel:
    """Attach a saved adapter, unmerged and frozen, after checking that it was trained on this base.

    Args:
        model: the base, loaded.
        base: its folder.
        adapter: the adapter's folder.
        elastic: use layers of ours, whose rank can be set, for a dense adapter too.

    Raises:
        InputError: the adapter names another base, or cannot be read.
    """
    check_base(base, adapter)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        if config.peft_type == "LORA" and not isinstance(config, SqftConfig) and (elastic or _is_packed(model)):
            # PEFT's own LoRA layer would add its delta to a weight that it only sees dequantised.
            config = SqftConfig(**{**_plain(config), "kind": "dense"})
        config.base_model_name_or_path = str(base)
        return cast("PreTrainedModel", PeftModel.from_pretrained(model, str(adapter), config=config))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"adapter {adapter}: does not load on {base}: {error}") from error


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _plain(config: PeftConfig) -> dict[str, Any]:
    """Return the settings that a LoraConfig's constructor takes."""
    values: dict[str, Any] = config.to_dict()
    return {f.name: values[f.name] for f in fields(LoraConfig) if f.init and f.name in values}


def check_base(base: str | Path, adapter: str | Path) -> None:
    """Refuse an adapter on a base that it was not trained on; a float adapter made elsewhere names none and passes.

    Raises:
        InputError: the digests differ, or a quantisation-aware adapter has none.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"adapter {adapter}: the folder has no adapter_config.json; give a PEFT adapter folder")
    config = read_json(Path(adapter) / "adapter_config.json")
    if config.get("kind") == "quantized":
        if config.get("base_identity") is None:
            raise InputError(
                f"adapter {adapter}: is quantisation-aware and does not say of which base; save it again with the "
                "base's folder in place"
            )
        check_identity(base, config["base_identity"], config["start"], f"adapter {adapter}: ")
        return
    trained_on = config.get("base_identity")
    if (Path(adapter) / MANIFEST).is_file():
        trained_on = Artifact.open(adapter).manifest["result"].get("base_identity")
    if trained_on is not None:
        check_identity(base, trained_on, None, f"adapter {adapter}: ")
