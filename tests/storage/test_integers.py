"""Stored forms of quantised weights against compressed-tensors' packing of whole tensors, and numbers by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from sqft.core.grid import BITS, Grid
from sqft.errors import InputError
from sqft.storage import scheme as formats
from sqft.storage.integers import parse_scheme, quantization_config
from sqft.storage.scheme import FormatName, Scheme


def quantised(bits: int, rows: int = 96, columns: int = 64) -> tuple[torch.Tensor, Grid]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    grid = Grid.fit(weight, bits=bits, group_size=32, symmetric=False, dtype=torch.float16, least_zero=1)
    return grid.quantize(weight), grid


@pytest.mark.parametrize("at_once", [2**20, 64 * 7, 1])  # the whole, stretches of 7 rows and one of 5, single rows
@pytest.mark.parametrize("bits", BITS)
def test_stretches_pack_to_what_the_whole_packs_to(bits: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PACKED_AT_ONCE", at_once)
    codes, grid = quantised(bits)
    middle = 2 ** (bits - 1)
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    zero = (grid.zero_OG.to(torch.int16) - middle).to(torch.int8)
    stored = Scheme("compressed-tensors", bits, 32, symmetric=False).encode(codes, grid)
    assert torch.equal(stored["weight_packed"], pack_to_int32(signed, bits, packed_dim=1))
    assert torch.equal(stored["weight_zero_point"], pack_to_int32(zero, bits, packed_dim=0))
    stored = Scheme("gptq", bits, 32, symmetric=False).encode(codes, grid)
    assert torch.equal(stored["qweight"], pack_to_int32(signed.T.contiguous(), bits, packed_dim=0))
    assert torch.equal(stored["qzeros"], pack_to_int32(zero.T.contiguous() - 1, bits, packed_dim=1))
    assert all(tensor.is_contiguous() for tensor in stored.values())


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_encoded_is_decoded(name: FormatName, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PACKED_AT_ONCE", 64 * 7)
    codes, grid = quantised(bits)
    scheme = Scheme(name, bits, 32, symmetric=False)
    stored = scheme.encode(codes, grid)
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()} == scheme.layout(
        (96, 64), torch.float16
    )
    found, same = scheme.decode(stored.__getitem__, (96, 64))
    assert torch.equal(found, codes)
    assert torch.equal(same.zero_OG, grid.zero_OG)
    assert torch.equal(same.scale_OG, grid.scale_OG)


def test_a_word_of_four_bit_codes_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    words = Scheme("compressed-tensors", 4, None, symmetric=True).encode_codes(codes)
    assert words.tolist() == [[0x76543210]]
    assert Scheme("gptq", 4, None, symmetric=True).encode_codes(codes).tolist() == [[0x76543210]]


def test_settings_beside_the_config_are_refused_with_how_to_convert(tmp_path: Path) -> None:
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    codes = torch.zeros(4, 8, dtype=torch.int32)
    save_file({"model.layers.0.self_attn.q_proj.qweight": codes}, tmp_path / "gptq_model-4bit-32g.safetensors")
    with pytest.raises(
        InputError, match=r"quantize_config\.json alone.*name gptq_model-4bit-32g\S+ model\.safet"
    ) as said:
        quantization_config(tmp_path)
    # What it says to put into config.json is what is read.
    settings = json.loads(re.findall(r'"quantization_config": (\{.*?\})', str(said.value))[0])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert parse_scheme(quantization_config(tmp_path) or {}, "it") == Scheme("gptq", 4, 32, symmetric=True)


def test_settings_beside_float_weights_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text("{}")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    assert quantization_config(tmp_path) is None
