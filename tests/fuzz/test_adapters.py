"""Damaged adapter folders: settings of wrong types and values, and tensors that do not fit them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fuzz.damage import copied, edited, json_bytes, outcome, put, share, tensor_files, values
from sqft.adapters.config import PEFT_TYPE, RANK_SPACE, SqftConfig
from sqft.adapters.saved import CONFIG, WEIGHTS, SavedAdapter, write_sub_adapter
from sqft.errors import InputError

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
SETTINGS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"up_proj": 16},
}
RANKS = {"choices": [4, 2], "groups": {"a": MODULES[:2], "b": MODULES[2:]}}
OTHERS = st.one_of(
    values(),
    st.sampled_from(
        [
            True,
            [True],
            {"x": 0},
            {"q_proj": -1},
            {".*": 4},
            {"(": 4},
            {"": 2},
            {"q_proj": 1.5},
            "(",
            "all-linear",
            "LORA",
        ]
    ),
    st.sampled_from(
        [
            "pissa",
            "eva",
            "olora",
            "gaussian",
            "lora_only",
            "CAUSAL_LM",
            "x",
            ["("],
            [[]],
            [["q_proj"]],
            {"q_proj": None},
        ]
    ),
)


def saved(folder: Path, peft_type: str) -> Path:
    """Write an adapter folder with all of the settings that PEFT writes."""
    ours = peft_type == PEFT_TYPE
    config = SqftConfig(kind="sparse", ranks=[4, 2], rank_groups=[["q_proj", "v_proj"]]).to_dict()
    del config["needs_sqft_layers"]  # derived from the kind, never saved
    own = ("kind", "ranks", "rank_groups", "start", "arithmetic")
    known = {name: value for name, value in config.items() if ours or name not in own}
    settings = {**known, **SETTINGS, "peft_type": peft_type, "rank_pattern": {} if ours else SETTINGS["rank_pattern"]}
    (folder / CONFIG).write_text(json.dumps(settings, default=str))
    tensors = {}
    for name in MODULES:
        rank = 2 if name.endswith("v_proj") and not ours else 4
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(6, rank)
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module", params=["LORA", PEFT_TYPE])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"), request.param)


def use(place: Path) -> None:
    """Open an adapter and take a sub-adapter out of it; what is taken out opens again with the same scaling."""
    adapter = outcome(lambda: SavedAdapter.open(place), place, leaves=place)
    if adapter is None:
        return
    assert adapter.kind in ("dense", "sparse", "quantized")
    assert all(low.rank > 0 and math.isfinite(low.scaling) for low in adapter.modules.values())
    space = outcome(adapter.rank_space, place, leaves=place)
    if space is None:
        return
    with copied() as part:
        if outcome(lambda: write_sub_adapter(adapter, space.per_module(space.minimal()), part) or part, place) is None:
            return
        again = SavedAdapter.open(part)
        assert again.modules.keys() == adapter.modules.keys()
        for name, low in again.modules.items():
            assert low.rank == min(space.choices)
            assert math.isclose(low.scaling, adapter.modules[name].scaling, rel_tol=1e-6)


def test_the_undamaged_ones_open(adapter: Path) -> None:
    opened = SavedAdapter.open(adapter)
    assert set(opened.modules) == set(MODULES)


@share(0.1)
@given(st.data())
def test_a_damaged_config_is_read_or_refused(adapter: Path, data: st.DataObject) -> None:
    with copied(adapter) as place:
        config = json.loads((adapter / CONFIG).read_text())
        put(place, CONFIG, data.draw(json_bytes(edited(config, OTHERS, most=2))))
        use(place)


@share(0.05)
@given(st.data())
def test_damaged_tensors_are_read_or_refused(adapter: Path, data: st.DataObject) -> None:
    with copied(adapter) as place:
        put(place, WEIGHTS, data.draw(tensor_files((adapter / WEIGHTS).read_bytes())))
        use(place)


@share(0.05)
@given(st.data())
def test_a_damaged_rank_space_is_read_or_refused(adapter: Path, data: st.DataObject) -> None:
    others = st.one_of(values(), st.sampled_from([4, 2, 1, True, 0, -1, 4.0, "4", *MODULES, MODULES, "a"]))
    with copied(adapter) as place:
        put(place, str(RANK_SPACE), data.draw(json_bytes(edited(RANKS, others))))
        use(place)


@pytest.mark.parametrize(
    "space",
    [
        {"choices": [], "groups": RANKS["groups"]},
        {"choices": [4, True], "groups": RANKS["groups"]},
        {"choices": "42", "groups": RANKS["groups"]},
        {"choices": [4, 2], "groups": {"a": [[], *MODULES]}},
        {"choices": [4, 2], "groups": {"a": MODULES, "b": MODULES[:1]}},
        {"choices": [4, 2], "groups": {name: name for name in MODULES}},
        {"choices": [4, 2]},
    ],
)
def test_a_rank_space_that_is_none_is_refused(adapter: Path, space: dict[str, Any]) -> None:
    with copied(adapter) as place:
        put(place, str(RANK_SPACE), json.dumps(space).encode())
        with pytest.raises(InputError, match=re.escape(str(place))):
            SavedAdapter.open(place).rank_space()


@pytest.mark.parametrize(
    "setting", [{"ranks": [4, []]}, {"ranks": "42"}, {"ranks": [0]}, {"ranks": [4, 2], "rank_groups": [[[]]]}]
)
def test_ranks_that_are_none_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    place = saved(tmp_path, PEFT_TYPE)
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**config, **setting}))
    with pytest.raises(InputError, match=re.escape(str(place))):
        SavedAdapter.open(place).rank_space()


@pytest.mark.parametrize(
    "setting",
    [
        {"target_modules": False},
        {"target_modules": ["q_proj", "v_proj", "up_proj", 1]},
        {"exclude_modules": [1]},
        {"layers_to_transform": ["0"]},
        {"layers_pattern": 1},
        {"lora_dropout": "0"},
        {"fan_in_fan_out": "false"},
        {"target_modules": "(q_proj"},
        {"exclude_modules": "["},
        {"layers_pattern": ["("]},
        {"alpha_pattern": {"*": 1}},
    ],
)
def test_settings_that_peft_does_not_take_are_refused(adapter: Path, setting: dict[str, Any]) -> None:
    with copied(adapter) as place:
        config = json.loads((adapter / CONFIG).read_text())
        put(place, CONFIG, json.dumps({**config, **setting}).encode())
        with pytest.raises(InputError, match=f"{next(iter(setting))} .*, which (PEFT does not take|is no regular)"):
            SavedAdapter.open(place)


def test_ranks_that_a_trainer_saved_beside_a_plain_adapter_are_read(tmp_path: Path) -> None:
    place = saved(tmp_path, PEFT_TYPE)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.5, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    (place / CONFIG).write_text(json.dumps(settings))
    put(place, str(RANK_SPACE), json.dumps({"ranks": [2, 4], "rank_groups": [["q_proj", "v_proj"]]}).encode())
    space = SavedAdapter.open(place).rank_space()
    assert space.choices == (4, 2)
    assert sorted(map(len, space.groups.values())) == [1, 2]
