"""The proof of a GGUF file: it passes for the model in any order of rows, and for nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from sqft.context import Context
from sqft.core.blocks import encode
from sqft.errors import InputError
from sqft.recipe import QuantizeConfig
from sqft.stages import quantize
from sqft.storage.gguf import prove
from sqft.storage.integers import PackedCheckpoint
from sqft.storage.tokenizer import mend_byte_fallback, splits_as_gpt2

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
Content = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def packed(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    out = tmp_path_factory.mktemp("packed") / "int4"
    quantize.run(QuantizeConfig(method="rtn", group_size=32), tiny_model("llama", "bfloat16"), None, out, Context())
    return PackedCheckpoint(out)


def contents(model: PackedCheckpoint) -> Content:
    """Return what a right file holds: blocks (uint8) of the linears, all else in float32."""
    found = {name: encode(*model.read(name), "Q4_1").numpy() for name in model.shapes}
    rest = set(model.checkpoint.entries) - set(model.stored_names())
    return found | {name: model.checkpoint.read(name).float().numpy() for name in rest}


def written(content: Content, file: Path) -> Path:
    writer = GGUFWriter(file, "llama")
    for name, data in content.items():
        kind = GGMLQuantizationType.Q4_1 if data.dtype == np.uint8 else GGMLQuantizationType.F32
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def permute(content: Content) -> None:
    content[Q] = content[Q][::-1]


def fuse(content: Content) -> None:
    content["fused"] = np.concatenate([content.pop(K), content.pop(Q)])


def add_one_to_a_norm(content: Content) -> None:
    content["model.norm.weight"] = content["model.norm.weight"] + 1


@pytest.mark.parametrize("change", [lambda content: None, permute, fuse])
def test_the_model_passes_in_any_order_of_rows(
    packed: PackedCheckpoint, tmp_path: Path, change: Callable[[Content], None]
) -> None:
    change(content := contents(packed))
    proof = prove(file := written(content, tmp_path / "m.gguf"), packed)
    weights = sum(rows * columns for rows, columns in packed.shapes.values())
    assert proof == {
        "linears": 14, "weights": weights, "type": "Q4_1", "bits": 5.0, "bytes": file.stat().st_size,
        "matrices": 2, "vectors": 5, "computed": 0,
    }  # fmt: skip


def test_a_vector_that_the_converter_computes_is_counted(packed: PackedCheckpoint, tmp_path: Path) -> None:
    add_one_to_a_norm(content := contents(packed))
    proof = prove(written(content, tmp_path / "m.gguf"), packed)
    assert (proof["vectors"], proof["computed"]) == (4, 1)


def flip_a_bit_of_a_code(content: Content) -> None:
    content[Q] = content[Q].copy()
    content[Q][3, 10] ^= 1


def flip_a_bit_of_a_scale(content: Content) -> None:
    content[Q] = content[Q].copy()
    content[Q][0, 0] ^= 1


def swap_two_columns(content: Content) -> None:
    content[Q] = content[Q].copy()
    content[Q][:, 4] = content[Q][:, 4] >> 4 | content[Q][:, 4] << 4


def repeat_a_row(content: Content) -> None:
    content[Q] = content[Q][[0, *range(1, len(content[Q]) - 1), 0]]


def lose_a_linear(content: Content) -> None:
    del content[K]


def have_a_linear_twice(content: Content) -> None:
    content["again"] = content[K]


def round_an_embedding(content: Content) -> None:
    content["lm_head.weight"] = content["lm_head.weight"] * np.float32(1.001)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit_of_a_code, rf"{Q} \(Q4_1\) holds rows that no linear of the folder has"),
        (flip_a_bit_of_a_scale, rf"{Q} \(Q4_1\) holds rows"),
        (swap_two_columns, rf"{Q} \(Q4_1\) holds rows"),
        (repeat_a_row, rf"{Q} \(Q4_1\) holds rows"),
        (lose_a_linear, f"1 linears are not in it: {K}"),
        (have_a_linear_twice, r"again \(Q4_1\) holds rows"),
        (round_an_embedding, r"lm_head.weight: \d+ of its 264 rows are not in the folder"),
    ],
)
def test_anything_else_is_refused(
    packed: PackedCheckpoint, tmp_path: Path, damage: Callable[[Content], None], said: str
) -> None:
    damage(content := contents(packed))
    with pytest.raises(InputError, match=said):
        prove(written(content, tmp_path / "m.gguf"), packed)


def test_a_file_that_is_none_is_refused(packed: PackedCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(InputError, match=r"m\.gguf: is no readable GGUF file"):
        prove(tmp_path / "m.gguf", packed)


def test_a_flag_without_bytes_is_cleared_and_nothing_else(tiny_model: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    shutil.copy(tiny_model("llama") / "tokenizer.json", file)
    right = file.read_text()
    assert '"byte_fallback": false' in right
    assert not mend_byte_fallback(tmp_path)
    file.write_text(right.replace('"byte_fallback": false', '"byte_fallback": true'))
    assert mend_byte_fallback(tmp_path)
    assert file.read_text() == right


def test_a_flag_of_a_vocabulary_with_bytes_stays(tiny_model: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    text = (tiny_model("llama") / "tokenizer.json").read_text()
    text = text.replace('"byte_fallback": false', '"byte_fallback": true')
    text = text.replace('"vocab": {', '"vocab": {"<0x0A>": 999,')
    file.write_text(text)
    assert not mend_byte_fallback(tmp_path)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('"use_regex": true', '"use_regex": false'),
        ('"add_prefix_space": false', '"add_prefix_space": true'),
        ('"type": "ByteLevel"', '"type": "Digits"'),
        ('"normalizer": null', '"normalizer": {"type": "NFC"}'),
    ],
)
def test_a_tokenizer_that_cuts_as_gpt2_is_told_from_others(tiny_model: Any, tmp_path: Path, was: str, now: str) -> None:
    text = (tiny_model("llama") / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    assert splits_as_gpt2(tmp_path)
    assert was in text
    (tmp_path / "tokenizer.json").write_text(text.replace(was, now))
    assert not splits_as_gpt2(tmp_path)


def test_no_tokenizer_cuts_nothing(tmp_path: Path) -> None:
    assert not splits_as_gpt2(tmp_path)
