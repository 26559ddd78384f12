"""Adapters on disk: read one for slicing or merging, and write a sub-adapter, without loading any model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeGuard, get_args, get_type_hints

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sqft.adapters.config import PEFT_TYPE, RANK_SPACE, SqftConfig
from sqft.adapters.plain import beyond_plain
from sqft.core.mask import finite
from sqft.core.ranks import RankSpace, group_modules
from sqft.disk import read_json
from sqft.errors import InputError, Problems

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PATTERNS = ("rank_pattern", "alpha_pattern")
_JSON = (bool, int, float, str, list, dict, tuple, NoneType)


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
    """An adapter folder.

    Attributes:
        path: the folder.
        config: what adapter_config.json holds.
        settings: the same as PEFT reads it.
        modules: factors by module name.
    """

    path: Path
    config: dict[str, Any]
    settings: LoraConfig
    modules: dict[str, LowRank]

    @property
    def kind(self) -> str:
        """dense, sparse or quantized."""
        return "dense" if self.config["peft_type"] == "LORA" else str(self.config["kind"])

    @property
    def ordered(self) -> bool:
        """Whether its arithmetic is the ordered one; that of an adapter that does not say is BLAS."""
        return self.kind != "dense" and self.config.get("arithmetic") == "ordered"

    @classmethod
    def open(cls, path: str | Path) -> SavedAdapter:
        """Read an adapter folder, ours or one that PEFT, TRL or others wrote, and check all that it says.

        Raises:
            InputError: it is no LoRA, does more than W + scaling · B A, or its settings and tensors contradict each
                other, are missing or are not finite; every problem.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise InputError(f"adapter {path}: the folder has no {CONFIG}; give a PEFT adapter folder")
        config = read_json(path / CONFIG)
        with Problems(f"adapter {path}") as problems:
            known = check_settings(config, problems)
        with Problems(f"adapter {path}") as problems:
            problems.extend(f"it has {extra}, which is not merged into a linear" for extra in beyond_plain(known))
            pairs = _pairs(_tensors(path, problems), problems)
            modules = {name: LowRank(*pair, _scaling(config, name)) for name, pair in pairs.items()}
            for name, low in modules.items():
                _check_factors(name, low, _rank(config, name), problems)
            if known.target_modules not in (None, "all-linear"):
                unnamed = [name for name in modules if not check_target_module_exists(known, name)]
                if unnamed:
                    problems.add(f"target_modules does not name {_listed(unnamed)}, of which it has tensors")
        return cls(path, config, known, modules)

    def rank_space(self) -> RankSpace:
        """Return the ranks that the super-adapter was trained with; without a record, the one rank of all modules.

        The record is a file of the stage finetune, or what a trainer saved of the configuration.

        Raises:
            InputError: there is no record and modules differ in rank: a sub-adapter, or another tool's rank_pattern.
        """
        file = self.path / RANK_SPACE
        file, values = (file, read_json(file)) if file.is_file() else (self.path / CONFIG, self.config)
        if "groups" in values or "choices" in values:
            choices, groups = values.get("choices"), values.get("groups")
            if not _are_ranks(choices) or not isinstance(groups, dict) or not _are_names([*groups.values()]):
                raise InputError(f"{file}: is no rank space of choices and groups; save the adapter again")
            space = RankSpace(tuple(choices), {group: tuple(members) for group, members in groups.items()})
        elif choices := values.get("ranks"):
            together = values.get("rank_groups") or []
            if not _are_ranks(choices) or not _are_names(together):
                raise InputError(
                    f"{file}: has ranks {choices!r} and rank_groups {together!r}; ranks are numbers above 0, groups "
                    "lists of names"
                )
            space = group_modules(self.modules, choices, together)
        else:
            return self._one_rank()
        if sorted(m for members in space.groups.values() for m in members) != sorted(self.modules):
            raise InputError(f"{file}: its groups are not the {len(self.modules)} modules of the adapter, each once")
        others = [name for name, low in self.modules.items() if low.rank != space.max_rank]
        if others:
            raise InputError(
                f"adapter {self.path}: its ranks are up to {space.max_rank}, and those of the tensors of "
                f"{_listed(others)} are not"
            )
        return space

    def _one_rank(self) -> RankSpace:
        ranks = {low.rank for low in self.modules.values()}
        if len(ranks) > 1:
            raise InputError(
                f"adapter {self.path}: its modules have ranks {', '.join(map(str, sorted(ranks)))} and it has no "
                f"{RANK_SPACE}, so it is no super-adapter to take another out of; merge or evaluate it as it is"
            )
        return RankSpace(tuple(sorted(ranks, reverse=True)), {name: (name,) for name in self.modules})


def check_settings(config: dict[str, Any], problems: Problems) -> LoraConfig:
    """Return what adapter_config.json says as PEFT's configuration; add what is missing, wrong or unknown."""
    if config.get("peft_type") not in ("LORA", PEFT_TYPE):
        problems.add(f"its peft_type is {config.get('peft_type')!r}; only LORA and {PEFT_TYPE} merge")
        return LoraConfig()
    ours = config["peft_type"] == PEFT_TYPE
    missing = [name for name in ("kind", "start") if ours and name not in config]
    problems.extend(
        f"{CONFIG} has no {name}, with which every adapter of type {PEFT_TYPE} is saved" for name in missing
    )
    for name, positive in (("r", _is_rank), ("lora_alpha", _is_alpha)):
        if not positive(config.get(name)):
            problems.add(f"{CONFIG} has {name} {config.get(name, 'nowhere')!r}; it must be a number above 0")
    for name, positive in zip(_PATTERNS, (_is_rank, _is_alpha), strict=True):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(positive(value) for value in pattern.values()):
            problems.add(f"{CONFIG}: {name} is no mapping of modules to numbers above 0")
    problems.extend(_mistyped(config, SqftConfig if ours else LoraConfig))
    problems.extend(_unreadable(config))
    takes = {f.name for f in fields(SqftConfig if ours else LoraConfig) if f.init}
    for name in sorted(set(config) - takes):
        if config[name]:
            problems.add(
                f"{CONFIG}: {name} is {config[name]!r}, which the PEFT installed here does not know; update PEFT"
            )
    identity = config.get("base_identity")
    if identity is not None and not (isinstance(identity, dict) and isinstance(identity.get("base"), str)):
        problems.add(f"{CONFIG}: base_identity is no mapping of digests")
    try:
        values = {name: value for name, value in config.items() if name in takes and name != "peft_type"}
        found: LoraConfig = (SqftConfig if ours else LoraConfig)(**values)
    except Exception as error:  # PEFT's own checks raise whatever fits them
        problems.add(f"{CONFIG}: {error}")
        return LoraConfig()
    return found


def _mistyped(config: dict[str, Any], taken: type[LoraConfig]) -> Iterator[str]:
    """Yield what is not of the type that PEFT declares, where that is made of JSON's own types."""
    for name, kind in get_type_hints(taken).items():
        # lora_alpha, declared as a whole number, is a fraction in many an adapter; both have their own check.
        if config.get(name) is None or name in ("r", "lora_alpha") or not _of_json(kind):
            continue
        try:
            TypeAdapter(kind).validate_json(json.dumps(config[name]), strict=True)
        except ValidationError:
            yield f"{CONFIG}: {name} is {config[name]!r}, which PEFT does not take"


def _unreadable(config: dict[str, Any]) -> Iterator[str]:
    """Yield the regular expressions that are none; lists are of names where PEFT does not read them as patterns."""
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", *_PATTERNS):
        value = config.get(name)
        many = isinstance(value, list | dict) and name not in ("target_modules", "exclude_modules")
        for text in value if many and value else [value]:
            try:
                re.compile(text if isinstance(text, str) else "")
            except re.error as error:
                yield f"{CONFIG}: {name} has {text!r}, which is no regular expression ({error})"


def _of_json(kind: Any) -> bool:
    return all(map(_of_json, get_args(kind))) if get_args(kind) else kind in _JSON


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_ranks(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(map(_is_rank, value))


def _are_names(value: Any) -> TypeGuard[list[list[str]]]:
    return isinstance(value, list) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value
    )


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _tensors(path: Path, problems: Problems) -> dict[str, torch.Tensor]:
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        problems.add(
            "its weights are adapter_model.bin, a pickle, which runs code when it is opened; load it where you trust "
            f"it and save it again: PEFT writes {WEIGHTS}"
        )
        return {}
    try:
        return dict(load_file(path / WEIGHTS))
    except (OSError, SafetensorError) as error:
        problems.add(f"{WEIGHTS} cannot be read ({error})")
        return {}


def _pairs(tensors: dict[str, torch.Tensor], problems: Problems) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (A, B) of each module."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part in ("lora_A", "lora_B") and key.startswith(_PREFIX) and key.endswith(".weight"):
            found.setdefault(name, {})[part] = tensor
        else:
            problems.add(f"tensor {key} is no LoRA factor; a resized vocabulary or extra module is not merged")
    if not found and not list(problems):
        problems.add(f"{WEIGHTS} has no LoRA factors")
    for name, pair in found.items():
        if len(pair) != 2:
            problems.add(f"{name} has only {', '.join(pair)}")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in found.items() if len(pair) == 2}


def _check_factors(name: str, low: LowRank, rank: int, problems: Problems) -> None:
    shapes = f"lora_A {list(low.lora_A.shape)} and lora_B {list(low.lora_B.shape)}"
    if low.lora_A.ndim != 2 or low.lora_B.ndim != 2 or low.lora_A.shape[0] != low.lora_B.shape[1]:
        problems.add(f"{name}: {shapes} do not multiply")
    elif low.rank != rank:
        problems.add(f"{name}: {shapes} have rank {low.rank}, and {CONFIG} says {rank}")
    for part, tensor in (("lora_A", low.lora_A), ("lora_B", low.lora_B)):
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            problems.add(f"{name}.{part} is stored as {tensor.dtype}; only float16, bfloat16 and float32 merge")
        elif not finite(tensor):
            wrong = int((~torch.isfinite(tensor)).sum())
            problems.add(f"{name}.{part} has {wrong} NaN or Inf of {tensor.numel()} values; train it again")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _rank(config: dict[str, Any], name: str) -> int:
    ranks = config.get("rank_pattern") or {}
    return int(ranks.get(get_pattern_key(list(ranks), name), config["r"]))


def _scaling(config: dict[str, Any], name: str) -> float:
    alphas, rank = config.get("alpha_pattern") or {}, _rank(config, name)
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
