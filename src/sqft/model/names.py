"""How the tensors of a checkpoint correspond to the parameters of a model.

On disk a fused parameter may lie in pieces and under other names. transformers knows how disk and memory correspond;
its conversion runs here in both directions, for tensors and for masks alike, so no architecture is named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from sqft.core.mask import unpack_mask
from sqft.model.opening import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import PreTrainedModel

    from sqft.storage.checkpoint import Checkpoint


class DiskNames:
    """How a checkpoint's tensors correspond to a model's parameters.

    Args:
        model: the skeleton.
        checkpoint: its folder's tensors.
        skip: tensors that are no parameters: the parts of quantised weights.
        quantizer: transformers' quantiser of the model, where it has one: its conversions and dtypes go with it.
        dtypes: those of transformers' parameters that are not in the dtype of the model, by patterns of names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        skip: Collection[str] = (),
        *,
        quantizer: Any = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        self.checkpoint = checkpoint
        self._quantizer, self._dtypes = quantizer, dict(dtypes or {})
        self.conversions = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        self._state = model.state_dict()
        # Whether a tensor on disk may be cut into several parameters; it then counts as the first one's.
        self.splits = any(len(c.target_patterns) > 1 for c in self._converters)
        self.parameter_of = {name: self.parameter(name) for name in checkpoint.entries if name not in skip}

    def parameter(self, name: str) -> str:
        """Return the parameter that a tensor of this name on disk belongs to."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(
            name, self._renamings, self._converters, self.model.base_model_prefix, self._state
        )
        return name if renamed not in self._state and name in self._state else str(renamed)

    def load(self, prefix: str, *, exclude: tuple[str, ...] = ()) -> None:
        """Read the parameters whose names start with `prefix` into the skeleton."""
        self._load(
            {
                name: self.checkpoint.read(name)
                for name, parameter in self.parameter_of.items()
                if parameter.startswith(prefix) and not parameter.startswith(exclude)
            }
        )

    def in_memory(self, prefix: str, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return packed on-disk masks as bool masks of the loaded parameters under `prefix`; True where none is given.

        The masks go the way of the weights: loaded in their place, taken out, and the weights put back.
        """
        loaded = {n: p.data for n, p in self.model.named_parameters() if n.startswith(prefix)}
        tensors = {}
        for name, parameter in self.parameter_of.items():
            if parameter.startswith(prefix):
                entry = self.checkpoint.entries[name]
                mask = masks.get(name)
                tensors[name] = (
                    torch.ones(entry.shape, dtype=entry.dtype)
                    if mask is None
                    else unpack_mask(mask, entry.shape[-1]).to(entry.dtype)
                )
        self._load(tensors)
        found = {name: self.model.get_parameter(name).data != 0 for name in loaded}
        for name, value in loaded.items():
            self.model.get_parameter(name).data = value
        return found

    def _load(self, tensors: dict[str, Any]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(
            weight_mapping=cast(Any, self.conversions),
            dtype=None,
            dtype_plan=self._dtypes,
            hf_quantizer=self._quantizer,
        )
        with quiet_transformers():
            convert_and_load_state_dict_in_model(self.model, tensors, options)

    def to_disk(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return parameters (or masks) of whole blocks under their on-disk names and layouts.

        Args:
            values: {parameter name: tensor}, of blocks that were loaded; a parameter that shares a tensor on disk
                with others must come with them.
        """
        from transformers.core_model_loading import revert_weight_conversion

        # load() has left on the model the conversions that this checkpoint really uses; they are reverted here.
        result = {}
        for name, tensor in revert_weight_conversion(self.model, values).items():
            short = name.removeprefix(f"{self.model.base_model_prefix}.")
            found = next((n for n in (name, short) if n in self.checkpoint.entries), None)
            if found is not None:
                result[found] = tensor
        return result
