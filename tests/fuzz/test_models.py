"""Damaged model folders: headers, indices, configs, masks and starting weights."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fuzz.damage import copied, edited, json_bytes, nested, outcome, put, share, tensor_files, values
from sqft.core.grid import Grid
from sqft.errors import InputError
from sqft.model.inspect import inspect_model
from sqft.storage.checkpoint import INDEX, WEIGHTS, Checkpoint
from sqft.storage.integers import PackedCheckpoint
from sqft.storage.masks import MASK_FILE, START_FILE, MaskFile, load_mask, load_start, read_masks
from sqft.storage.scheme import Scheme

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WEIGHT = "model.layers.0.mlp.up_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", **TINY)


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in two files."""
    folder = tmp_path_factory.mktemp("sharded")
    tensors = load_file(model / WEIGHTS)
    named = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if named[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module", params=["compressed-tensors", "gptq"])
def packed(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with one weight in four bits, its mask and its start beside it."""
    folder = tmp_path_factory.mktemp("packed")
    scheme = Scheme(request.param, 4, 8, symmetric=False)
    tensors = load_file(model / WEIGHTS)
    shape = tensors.pop(WEIGHT).shape
    groups = (shape[0], shape[1] // 8)
    grid = Grid(torch.ones(groups, dtype=torch.float16), torch.full(groups, 8, dtype=torch.uint8), 4, shape[1], False)
    stored = scheme.encode(torch.full(shape, 8, dtype=torch.uint8), grid)
    tensors |= {f"{WEIGHT.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in stored.items()}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((model / "config.json").read_text())
    ignored = ["lm_head", *(n.removesuffix(".weight") for n in tensors if "proj.weight" in n)]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme.to_config(ignored)}))
    (folder / "sqft").mkdir()
    masks = MaskFile(folder)
    masks.write(WEIGHT, torch.ones(16, 16, dtype=torch.bool))
    masks.finish()
    save_file({WEIGHT: torch.zeros(shape, dtype=torch.int8)}, folder / START_FILE)
    return folder


def use(place: Path) -> None:
    """Open a model folder in all the ways that stages do."""
    checkpoint = outcome(lambda: Checkpoint(place), place, leaves=place)
    if checkpoint is not None:
        for name in checkpoint.entries:
            outcome(lambda: checkpoint.read(name), place)  # noqa: B023
        outcome(lambda: checkpoint.dtype, place)
        outcome(checkpoint.check_finite, place)
    packed = outcome(lambda: PackedCheckpoint(place), place, leaves=place)
    for name in packed.shapes if packed else ():
        outcome(lambda: packed.read(name), place)  # noqa: B023
    outcome(lambda: inspect_model(place), "", leaves=place)


@share(0.06)
@given(st.data())
def test_a_damaged_tensor_file_is_read_or_refused(model: Path, data: st.DataObject) -> None:
    with copied(model) as place:
        put(place, WEIGHTS, data.draw(tensor_files((model / WEIGHTS).read_bytes())))
        use(place)


@share(0.04)
@given(st.data())
def test_a_damaged_packed_model_is_read_or_refused(packed: Path, data: st.DataObject) -> None:
    with copied(packed) as place:
        put(place, WEIGHTS, data.draw(tensor_files((packed / WEIGHTS).read_bytes())))
        use(place)


@share(0.04)
@given(st.data())
def test_a_damaged_quantization_config_is_read_or_refused(packed: Path, data: st.DataObject) -> None:
    config = json.loads((packed / "config.json").read_text())
    others = st.one_of(values(), st.sampled_from(["group", "channel", "int", "float", -1, 2, 3, 4, 8, 16, 32, "4"]))
    config["quantization_config"] = data.draw(edited(config["quantization_config"], others))
    with copied(packed) as place:
        put(place, "config.json", json.dumps(config).encode())
        use(place)


@share(0.04)
@given(st.data())
def test_a_damaged_index_is_read_or_refused(sharded: Path, data: st.DataObject) -> None:
    names = st.sampled_from(
        [*SHARDS, "../x.safetensors", "/etc/passwd", "", ".", "config.json", INDEX, "\x00", "a" * 300]
    )
    with copied(sharded) as place:
        index = json.loads((sharded / INDEX).read_text())
        put(place, INDEX, data.draw(json_bytes(edited(index, st.one_of(names, st.just(index), st.integers())))))
        use(place)


@share(0.04)
@given(st.data())
def test_a_damaged_config_is_read_or_refused(model: Path, data: st.DataObject) -> None:
    # No large numbers: as many blocks as the config says are built, on the meta device.
    small = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 40),
        st.floats(-2, 40),
        st.sampled_from(["", "x", [], {}, [1], {"a": 1}]),
    )
    with copied(model) as place:
        put(place, "config.json", data.draw(json_bytes(edited(json.loads((model / "config.json").read_text()), small))))
        use(place)


@share(0.04)
@given(st.data())
def test_a_damaged_mask_or_start_is_read_or_refused(packed: Path, data: st.DataObject) -> None:
    with copied(packed) as place:
        mask = put(place, str(MASK_FILE), data.draw(tensor_files((packed / MASK_FILE).read_bytes())))
        put(place, str(START_FILE), data.draw(tensor_files((packed / START_FILE).read_bytes())))
        found = outcome(lambda: load_mask(place, WEIGHT), mask, leaves=place)
        assert found is None or (found.dtype == torch.bool and found.shape == (16, 16))
        offsets = outcome(lambda: load_start(place, WEIGHT, "compensated"), place, leaves=place)
        assert offsets is None or isinstance(offsets, torch.Tensor)


@share(0.04)
@given(st.data())
def test_masks_made_elsewhere_are_read_or_refused(model: Path, packed: Path, data: st.DataObject) -> None:
    source = Checkpoint(model)
    with copied() as place:
        mask = put(place, "mask.safetensors", data.draw(tensor_files((packed / MASK_FILE).read_bytes())))
        for name, found in (outcome(lambda: read_masks(mask, source, {WEIGHT}), mask, leaves=place) or {}).items():
            rows, columns = source.entries[name].shape
            assert found.dtype == torch.uint8
            assert found.shape == (rows, -(-columns // 8))


@pytest.mark.parametrize(
    "content", [nested("{}", 3000), nested('{"weight_map": {}}', 900), '{"weight_map": {"a": [1]}}']
)
def test_an_index_that_is_none_is_refused(sharded: Path, content: str) -> None:
    with copied(sharded) as place:
        put(place, INDEX, content.encode())
        with pytest.raises(InputError, match=f"{re.escape(str(place))}.*{INDEX}"):
            Checkpoint(place)


def test_a_header_that_is_nested_too_deeply_is_refused(model: Path) -> None:
    with copied(model) as place:
        header = nested("{}", 3000).encode()
        put(place, WEIGHTS, struct.pack("<Q", len(header)) + header)
        with pytest.raises(InputError, match=f"{re.escape(str(place))}.*no readable header"):
            Checkpoint(place)
