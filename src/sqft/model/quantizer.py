"""Packed weights through `from_pretrained`: a quantiser registered with transformers.

    AutoModelForCausalLM.from_pretrained(folder, config=sqft.packed_config(folder))

opens a compressed-tensors or GPTQ folder with its integers packed in memory (:class:`sqft.model.packed.PackedLinear`);
device maps, shards, tied weights, generation config and the report of missing weights are transformers'. Without the
config the folder opens as it always did: nothing is patched. The config selects it, because transformers
refuses a `quantization_config` argument of another class than the folder's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sqft.core.grid import Grid, QuantizedWeight, pack_codes, storage_bits
from sqft.errors import InputError
from sqft.model.archived import ArchivedLinear
from sqft.model.names import DiskNames
from sqft.model.opening import check_complete, load_config
from sqft.model.packed import PackedLinear, stored_bytes
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint, quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sqft.storage.scheme import Scheme

METHOD = "sqft-packed"
ARCHIVED_METHOD = "sqft-archived"


def packed_config(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return a quantised folder's config for `from_pretrained(folder, config=...)` to keep its weights packed.

    Args:
        folder: model folder, or the Hub id that is opened.
        trust_remote_code: passed to transformers.

    Raises:
        InputError: the folder is not quantised, or its config cannot be read.
    """
    if Path(folder).is_dir():
        stored = quantization_config(folder)
        config = load_config(folder, trust_remote_code=trust_remote_code)
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise InputError(f"model {folder}: is not quantised; open it with from_pretrained alone")
    config.quantization_config = PackedConfig().to_dict()
    return config


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What asks for :class:`PackedQuantizer`; the scheme is read from the folder."""

    def __init__(self, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]


class _Pack(ConversionOps):
    """The stored tensors of one linear -> the bytes of a PackedLinear, one linear at a time."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return {parameter: bytes}; the keys of `input_dict` are the converter's patterns."""
        name = kwargs["full_layer_name"].rpartition(".")[0]
        linear: Any = kwargs["model"].get_submodule(name)
        codes, grid = self.scheme.decode(
            lambda suffix: input_dict[_pattern(suffix)][0], (linear.out_features, linear.in_features)
        )
        linear._is_hf_initialized = True  # else transformers asks for its float weight
        return {f"{name}.{key}": value for key, value in stored_bytes(pack_codes(codes, grid.bits), grid).items()}


def _pattern(suffix: str) -> str:
    return rf"\.{suffix}$"


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts packed linears in the places of quantised ones, and lets transformers load them.

    Raises:
        InputError: while loading: the folder cannot be read, or contradicts its config or the model.
    """

    requires_calibration = True  # it opens what is quantised already, and quantises nothing

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("packed weights are read from a folder; give from_pretrained one, and no state_dict")
        folder = Path(checkpoint_files[0]).parent
        with torch.device("cpu"):  # transformers makes models on the meta device
            source = PackedCheckpoint(folder)
        self.scheme = source.scheme
        names = DiskNames(model, source.checkpoint, skip=source.stored_names())
        self._remember(model, names)
        stored, modules = set(names.parameter_of.values()), dict(model.named_modules())
        lost = []
        for weight, shape in source.shapes.items():
            module = names.parameter(weight).removesuffix(".weight")
            linear = modules.get(module)
            if not isinstance(linear, nn.Linear):
                raise InputError(f"model {folder}: {weight} is quantised, but the model has no linear {module}")
            empty = _empty(source.scheme, shape, source.scale_dtype(weight), model.dtype)
            packed = PackedLinear(empty, folder=folder)
            packed.bias = linear.bias
            if linear.bias is not None and f"{module}.bias" not in stored:
                lost.append(f"{module}.bias")
            model.set_submodule(module, packed)
        check_complete(folder, lost)

    def _remember(self, model: PreTrainedModel, names: DiskNames) -> None:
        # What transformers does not do where there is a quantiser: compare shapes, and cast what it renames.
        self.folder = names.checkpoint.folder
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.renamed = {parameter for name, parameter in names.parameter_of.items() if name != parameter}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        wrong = []
        for name, parameter in model.named_parameters():
            if parameter.shape != self.shapes.get(name, parameter.shape):
                wrong.append(name)
            elif name in self.renamed and parameter.is_floating_point():
                parameter.data = parameter.data.to(model.dtype)
        check_complete(self.folder, wrong)
        model.requires_grad_(False)
        # Its linears multiply as any others do: PEFT may ask for gradients of its inputs, and `half()` is no harm.
        cast("Any", model).is_quantized = False

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return the model's own conversions behind ours, whose names the model's patterns may begin."""
        sources = [_pattern(suffix) for suffix in self.scheme.suffixes]
        return [WeightConverter(sources, ".packed", [_Pack(self.scheme)]), *weight_conversions]

    def is_serializable(self) -> bool:
        """Refuse saving.

        Raises:
            InputError: always; says what to save in its place.
        """
        raise InputError(
            "a model with packed linears is not saved from memory: its tensors are in an order of ours that no other "
            "tool reads. Save the adapter and merge it on disk with sqft merge, which writes a standard folder"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters train on it."""
        return True


@register_quantization_config(ARCHIVED_METHOD)
class ArchivedConfig(QuantizationConfigMixin):
    """What asks for :class:`ArchivedQuantizer`.

    Args:
        linears: names of the modules whose weights are not among the files.
        packed: whether there are quantised weights among them.
    """

    def __init__(self, linears: list[str], packed: bool, quant_method: str = ARCHIVED_METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.linears, self.packed = linears, packed


@register_quantizer(ARCHIVED_METHOD)
class ArchivedQuantizer(PackedQuantizer):
    """Puts linears of an archive in the places of those whose weights come from there; whoever loads fills them."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = cast("ArchivedConfig", self.quantization_config)
        if config.packed:
            super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
        elif checkpoint_files:
            self._remember(model, DiskNames(model, Checkpoint(Path(checkpoint_files[0]).parent)))
        for module in config.linears:
            model.set_submodule(module, ArchivedLinear(cast("nn.Linear", model.get_submodule(module))))

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return the model's own conversions, and ours where quantised weights are loaded."""
        packed = cast("ArchivedConfig", self.quantization_config).packed
        return super().update_weight_conversions(weight_conversions) if packed else weight_conversions


def _empty(scheme: Scheme, shape: tuple[int, int], scale: torch.dtype, dtype: torch.dtype) -> QuantizedWeight:
    """Return a packed weight [O, I] without data."""
    rows, columns = shape
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    width = -(-columns * storage_bits(scheme.bits) // 8)
    with torch.device("meta"):
        grid = Grid(
            torch.empty(rows, groups, dtype=scale),
            torch.empty(rows, groups, dtype=torch.uint8),
            scheme.bits,
            columns,
            scheme.symmetric,
        )
        return QuantizedWeight(torch.empty(rows, width, dtype=torch.uint8), grid, dtype)
