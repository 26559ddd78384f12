"""Put a saved adapter on the model of its base, after checking that it is its base, and open the two together."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from sqft.adapters.config import SqftConfig
from sqft.adapters.plain import plain_settings
from sqft.adapters.saved import SavedAdapter
from sqft.artifact import MANIFEST, Artifact
from sqft.device import resolve
from sqft.errors import InputError, Problems
from sqft.model.load import open_model
from sqft.model.packed import PackedLinear
from sqft.storage.identity import check_identity
from sqft.storage.integers import quantization_config

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel


def load_model(
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    packed: bool = False,
    elastic: bool = False,
    attention: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return a model folder's causal language model, with an adapter attached if one is given.

    A quantised folder is opened by transformers, which decompresses it: what any user of the folder gets. With an
    adapter or `packed`, its weights stay packed in memory; so do those of GPTQ folders. With neither, an archive's
    linears stay in memory as they are, where the kernel for decoding can be used (:mod:`sqft.kernels.decode`).

    Args:
        folder: model folder.
        adapter: adapter folder to attach, unmerged, or None.
        packed: keep quantised weights packed; adapters can be trained on them.
        elastic: attach a dense adapter with layers whose rank can be set, too, instead of PEFT's own.
        attention: attention implementation; None leaves transformers' choice.
        trust_remote_code: passed to transformers.
        device: where it will compute; None is a card where there is one. The model itself is on the CPU.

    Returns:
        The model in evaluation mode, in the dtype that it is stored in.

    Raises:
        InputError: the folder does not load, or the adapter does not belong to it.
    """
    packed = packed or adapter is not None
    in_place = not packed and (device or resolve()).type == "cpu"
    model = open_model(
        folder, packed=packed, in_place=in_place, attention=attention, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        model = attach_saved(model, folder, adapter, elastic=elastic)
        model.eval()
    return model


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
        InputError: the adapter names another base, cannot be read, or has other modules than the model gets.
    """
    saved = SavedAdapter.open(adapter)
    check_trained_on(base, saved)
    with _loading(base, adapter):
        config = _config(base, adapter, ours=elastic or any(isinstance(m, PackedLinear) for m in model.modules()))
        attached = cast("PreTrainedModel", PeftModel.from_pretrained(model, str(adapter), config=config))
    found = {name.removeprefix("base_model.model.") for name, m in attached.named_modules() if isinstance(m, LoraLayer)}
    check_modules(saved, base, found)
    return attached


def block_attacher(base: str | Path, saved: SavedAdapter) -> Callable[[PreTrainedModel, str], None]:
    """Return what attaches an adapter's part of a block to a model of which that block alone has its weights.

    For :class:`sqft.model.blockwise.BlockwiseModel`; whether the adapter belongs to the base is checked before.

    Args:
        base: the base's folder.
        saved: the adapter.
    """

    def attach(network: PreTrainedModel, block: str) -> None:
        inside = {name: low for name, low in saved.modules.items() if name.startswith(f"{block}.")}
        if not inside:
            return
        with _loading(base, saved.path):
            adapted = PeftModel(network, _config(base, saved.path, ours=quantization_config(base) is not None))
            tensors = {
                f"base_model.model.{name}.{part}.weight": getattr(low, part)
                for name, low in inside.items()
                for part in ("lora_A", "lora_B")
            }
            set_peft_model_state_dict(adapted, tensors)
        del network.peft_config  # PEFT would take the next block's for a second adapter

    return attach


@contextmanager
def _loading(base: str | Path, adapter: str | Path) -> Iterator[None]:
    """Turn what PEFT raises into an error that names both folders."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(f"adapter {adapter}: does not load on {base}: {error}") from error


def _config(base: str | Path, adapter: str | Path, *, ours: bool) -> PeftConfig:
    """Return the configuration with which PEFT attaches an adapter, with layers of ours for a dense one if asked."""
    config: Any = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type == "LORA" and not isinstance(config, SqftConfig) and ours:
        # PEFT's own LoRA layer would add its delta to a weight that it only sees dequantised.
        config = SqftConfig(**{**plain_settings(config), "kind": "dense"})
    config.base_model_name_or_path = str(base)
    return cast("PeftConfig", config)


def check_modules(adapter: SavedAdapter, base: str | Path, adapted: Collection[str]) -> None:
    """Refuse an adapter whose tensors are not those of the linears that it adapts.

    Args:
        adapter: the adapter.
        base: names the base in the message.
        adapted: names of the base's linears that the adapter's settings choose.

    Raises:
        InputError: names those without tensors, and tensors without a linear.
    """
    with Problems(f"adapter {adapter.path} on base {base}") as problems:
        for without, what in (
            (sorted(set(adapted) - set(adapter.modules)), "its settings adapt {}, of which it has no tensors"),
            (sorted(set(adapter.modules) - set(adapted)), "{} is no linear of the base that it could adapt"),
        ):
            for name in without[:5]:
                problems.add(what.format(name))
            if len(without) > 5:
                problems.add(f"and {len(without) - 5} more")


def check_trained_on(base: str | Path, adapter: SavedAdapter) -> None:
    """Refuse an adapter on a base that it was not trained on; a float adapter made elsewhere names none and passes.

    Raises:
        InputError: the digests differ, a quantisation-aware adapter has none, or the adapter has changed since its
            manifest was written.
    """
    where = f"adapter {adapter.path}: "
    trained_on = adapter.config.get("base_identity")
    if adapter.kind == "quantized":
        if trained_on is None:
            raise InputError(
                f"{where}is quantisation-aware and does not say of which base; save it again with the base's folder in "
                "place"
            )
        check_identity(base, trained_on, adapter.config.get("start", SqftConfig.start), where)
        return
    trained_on = recorded_base(adapter.path) or trained_on
    if trained_on is not None:
        check_identity(base, trained_on, None, where)


def recorded_base(adapter: Path) -> dict[str, str] | None:
    """Return the digests of the base that a folder of ours was trained on; None of an adapter made elsewhere.

    Raises:
        InputError: the folder has changed since its manifest was written.
    """
    if not (adapter / MANIFEST).is_file():
        return None
    found: dict[str, str] | None = Artifact.open(adapter).check().manifest["result"].get("base_identity")
    return found
