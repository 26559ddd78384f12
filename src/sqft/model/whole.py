"""Whether a folder's tensors are those of the model that its config describes; checked before any work on them.

transformers opens a folder that lacks tensors, or has too many, and fills or leaves them with a warning. A compressed
model made of it would be another one than was trained, so what transformers only warns of is refused here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from sqft.errors import Problems
from sqft.model.names import DiskNames
from sqft.model.targets import decoder_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from sqft.storage.checkpoint import Checkpoint

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_whole(network: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a folder whose tensors contradict its config.

    Args:
        network: the skeleton.
        checkpoint: the folder's tensors, not quantised.

    Raises:
        InputError: blocks that the config has not, weights that are missing, of another shape, or no floats.
    """
    names = DiskNames(network, checkpoint)
    with Problems(f"model {checkpoint.folder}") as problems:
        if surplus := _surplus(network, names):
            count = len(decoder_blocks(network)[1])
            problems.add(
                f"has tensors of more blocks than its config.json names ({count}): {_listed(surplus)}; set "
                "num_hidden_layers to what the weights have, or get the checkpoint again"
            )
        if missing := _missing(network, names):
            problems.add(f"lacks {_listed(missing)}; get the checkpoint again, or mend config.json")
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        floats = {name for name, value in network.state_dict().items() if value.is_floating_point()}
        odd = [
            f"{name} ({str(checkpoint.entries[name].dtype).removeprefix('torch.')})"
            for name, parameter in names.parameter_of.items()
            if parameter in floats and checkpoint.entries[name].dtype not in _FLOATS
        ]
        if odd:
            problems.add(
                f"has weights that are no floats: {_listed(odd)}; sqft compresses float16, bfloat16 and float32: get "
                "the float checkpoint"
            )
        # What transformers renames and nothing more has one shape on disk and in memory.
        wrong = [
            f"{name} {list(checkpoint.entries[name].shape)}, not {list(shapes[parameter])}"
            for name, parameter in names.parameter_of.items()
            if (name == parameter or parameter.endswith(f".{name}")) and parameter in shapes
            if checkpoint.entries[name].shape != shapes[parameter]
        ]
        if wrong:
            problems.add(f"has weights of other shapes than its config.json gives: {_listed(wrong)}")


def _surplus(network: PreTrainedModel, names: DiskNames) -> list[str]:
    """Return the tensors of blocks that the model has not, but for those that transformers leaves on purpose."""
    prefix, blocks = decoder_blocks(network)
    short = prefix.removeprefix(f"{network.base_model_prefix}.")
    pattern = re.compile(rf"(?:{re.escape(prefix)}|{re.escape(short)})\.(\d+)\.")
    left = [re.compile(p) for p in network._keys_to_ignore_on_load_unexpected or ()]
    return [
        name
        for name in names.parameter_of
        if (found := pattern.match(name)) and int(found[1]) >= len(blocks) and not any(p.search(name) for p in left)
    ]


def _missing(network: PreTrainedModel, names: DiskNames) -> list[str]:
    """Return the parameters that no tensor belongs to; of tied ones, one is enough."""
    if names.splits:
        return []  # a tensor on disk may then be several parameters: the loading of each block tells
    stored = set(names.parameter_of.values())
    alike: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        alike.setdefault(id(parameter), []).append(name)
    left = [re.compile(p) for p in network._keys_to_ignore_on_load_missing or ()]
    lacking = [group[0] for group in alike.values() if stored.isdisjoint(group)]
    return [name for name in lacking if not any(p.search(name) for p in left)]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
