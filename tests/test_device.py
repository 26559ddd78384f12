"""Which device a name means, and that every stage keeps its tensors on it: tried with a stand-in for a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from card import CARD, OnCard, WrongDevice, card
from sqft.context import Context
from sqft.device import device_key, place, resolve
from sqft.errors import InputError
from sqft.recipe import QuantizeConfig, SparsifyConfig
from sqft.stages import quantize, sparsify

COMPRESSIONS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "wanda": ({}, None),
    "2:4": ({"pattern": "2:4"}, None),
    "sparsegpt": ({"method": "sparsegpt"}, None),
    "update": ({"update": True}, None),
    "rtn": (None, {"method": "rtn"}),
    "gptq": (None, {}),
    "gptq format": (None, {"format": "gptq", "symmetric": True, "act_order": False}),
    "joint": ({}, {}),
    "joint sparsegpt": ({"method": "sparsegpt"}, {}),
    "joint update": ({"update": True}, {}),
}


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


@patch("sqft.core.columns.kernel_on", return_value=None)  # the stand-in has none
def compressed(name: str, model: Path, out: Path, context: Context, _kernel_on: Any) -> dict[str, bytes]:
    pruning, grid = COMPRESSIONS[name]
    prune = None if pruning is None else SparsifyConfig(**pruning)
    if grid is None:
        assert prune is not None
        sparsify.run(prune, model, tokens(), out, context)
    else:
        quantize.run(QuantizeConfig(**{"group_size": 16, **grid}), model, tokens(), out, context, sparsify=prune)
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_block_is_compressed_where_it_runs_and_comes_out_the_same(name: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = compressed(name, model, tmp_path / "cpu", Context(device_name="cpu"))
    with card():
        found = compressed(name, model, tmp_path / "card", Context(device_name="cuda"))
    assert found == expected


def test_the_stand_in_refuses_what_a_card_would() -> None:
    with card():
        there = torch.ones(2, 3).to(CARD)
        assert isinstance(there, OnCard) and there.device == CARD
        assert not isinstance(there.cpu(), OnCard)
        with pytest.raises(WrongDevice, match="add"):
            there + torch.ones(3)
        with pytest.raises(WrongDevice):
            torch.linalg.cholesky_ex(
                torch.eye(2).to(CARD), out=(torch.eye(2).to(CARD), torch.empty((), dtype=torch.int32))
            )
        assert float((there + torch.tensor(1.0)).sum()) == 12


def test_hidden_states_that_a_card_has_no_room_for_stay_in_the_host(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = compressed("joint", model, tmp_path / "cpu", Context(device_name="cpu"))
    with card(free=10_000):
        found = compressed("joint", model, tmp_path / "card", Context(device_name="cuda"))
    assert found == expected


def test_auto_is_the_card_where_there_is_one() -> None:
    assert resolve("auto").type == "cpu" and resolve("cpu").type == "cpu"
    with card():
        assert resolve("auto") == CARD and resolve("cuda") == CARD and resolve("cpu").type == "cpu"


def test_a_card_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(InputError, match=r"device cuda: there is no CUDA device here; PyTorch .* is built for"):
        resolve("cuda")


def test_a_model_larger_than_the_card_is_refused_with_the_numbers() -> None:
    linear = torch.nn.Linear(1000, 1000)
    with (
        card(free=1_000_000),
        pytest.raises(InputError, match=r"takes 0.004 GB and cuda:0 has 0.001 GB free; quantise it"),
    ):
        place(linear, resolve("cuda"), "quantise it")


def test_a_cpu_changes_no_key_and_a_card_does() -> None:
    assert device_key(torch.device("cpu")) == {}
    assert device_key(CARD) == {"device": "cuda"}
