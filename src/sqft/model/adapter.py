"""Adapters on disk: read one for slicing or merging, and write a sub-adapter, without loading any model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sqft.core.ranks import RankSpace
from sqft.errors import InputError, Problems
from sqft.model.layers import INITS
from sqft.model.load import read_json

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RANK_SPACE = Path("sqft") / "rank_space.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """One module's factors: A [R, I], B [O, R] and the scaling of their product."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    def slice(self, rank: int) -> LowRank:
        """Return the sub-adapter of a smaller rank, with the same scaling (SQFT section 2.2)."""
        return replace(self, lora_A=self.lora_A[:rank].contiguous(), lora_B=self.lora_B[:, :rank].contiguous())


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder: its PEFT config and its factors by module name."""

    path: Path
    config: dict[str, Any]
    modules: dict[str, LowRank]

    @property
    def kind(self) -> str:
        """dense, sparse or quantized."""
        return "dense" if self.config["peft_type"] == "LORA" else str(self.config["kind"])

    @classmethod
    def open(cls, path: str | Path) -> SavedAdapter:
        """Read an adapter folder, ours or one that PEFT, TRL or others wrote.

        Raises:
            InputError: not a LoRA, or it has parts that do not merge into a linear, each named.
        """
        path = Path(path)
        config = read_json(path / CONFIG)
        if config.get("peft_type") not in ("LORA", "SQFT"):
            raise InputError(f"adapter {path}: its peft_type is {config.get('peft_type')!r}; only LORA and SQFT merge")
        try:
            tensors = load_file(path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise InputError(f"adapter {path}: {WEIGHTS} cannot be read ({error})") from error
        factors: dict[str, dict[str, torch.Tensor]] = {}
        with Problems(f"adapter {path}") as problems:
            for option in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
                if config.get(option):
                    problems.add(f"it uses {option}, which cannot be merged into the base's linears")
            if (begun := config.get("init_lora_weights")) not in INITS:
                problems.add(
                    f"it began with init_lora_weights: {begun}, which rewrote the base's weights; save it with PEFT's "
                    "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
                )
            for key, tensor in tensors.items():
                name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
                if part in ("lora_A", "lora_B"):
                    factors.setdefault(name, {})[part] = tensor
                elif not config.get("modules_to_save"):
                    problems.add(f"tensor {key} is no LoRA factor; a resized vocabulary or extra module is not merged")
            for name, pair in factors.items():
                if len(pair) != 2:
                    problems.add(f"{name} has only {', '.join(pair)}")
        modules = {
            name: LowRank(pair["lora_A"], pair["lora_B"], _scaling(config, name)) for name, pair in factors.items()
        }
        return cls(path, config, modules)

    def rank_space(self) -> RankSpace:
        """Return the ranks that the super-adapter was trained with; without a record, the one rank of all modules.

        Raises:
            InputError: there is no record and modules differ in rank: a sub-adapter, or another tool's rank_pattern.
        """
        file = self.path / RANK_SPACE
        if file.is_file():
            values = read_json(file)
            return RankSpace(tuple(values["choices"]), {g: tuple(m) for g, m in values["groups"].items()})
        ranks = {low.rank for low in self.modules.values()}
        if len(ranks) > 1:
            raise InputError(
                f"adapter {self.path}: its modules have ranks {', '.join(map(str, sorted(ranks)))} and it has no "
                f"{RANK_SPACE}, so it is no super-adapter to take another out of; merge or evaluate it as it is"
            )
        return RankSpace(tuple(sorted(ranks, reverse=True)), {name: (name,) for name in self.modules})


def _scaling(config: dict[str, Any], name: str) -> float:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = float(ranks.get(get_pattern_key(list(ranks), name), config["r"]))
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def write_sub_adapter(adapter: SavedAdapter, ranks: dict[str, int], folder: Path) -> None:
    """Write the sub-adapter with these ranks as a PEFT adapter.

    The scaling alpha / r_max must not change with the rank, so alpha_pattern holds alpha · r / r_max for each module:
    without it PEFT would scale by alpha / r.

    Args:
        adapter: the super-adapter.
        ranks: {module name: rank}.
        folder: an existing folder to write into.
    """
    tensors, alphas = {}, {}
    for name, low in adapter.modules.items():
        part = low.slice(ranks[name])
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = part.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = part.lora_B
        alpha = low.scaling * part.rank
        alphas[name] = int(alpha) if alpha == int(alpha) else alpha
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    config = {
        **adapter.config,
        "r": common,
        "lora_alpha": next(alphas[name] for name in alphas if ranks[name] == common),
        "rank_pattern": {name: ranks[name] for name in adapter.modules},
        "alpha_pattern": alphas,
        "use_rslora": False,
    }
    if "ranks" in config:
        config["ranks"] = None
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
