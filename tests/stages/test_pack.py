"""A sparse folder gets smaller and comes back byte for byte; an archive stands for the model; damage is found."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, safe_open

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.layers import sqft_layers
from sqft.context import Context
from sqft.digests import digest_names, file_digests
from sqft.errors import InputError
from sqft.model.inspect import inspect_model
from sqft.recipe import MergeConfig, QuantizeConfig, SparsifyConfig, VerifyConfig
from sqft.stages import merge, quantize, sparsify, verify
from sqft.stages import pack as pack_module
from sqft.stages.pack import pack, unpack
from sqft.storage.archive import ArchiveFile
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint
from sqft.storage.masks import load_mask, load_start

WIDE = {"hidden_size": 128, "intermediate_size": 256}


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def sparse(model: Path, out: Path, *, pattern: str | None = None, sparsity: float = 0.5) -> Path:
    amount = {"sparsity": sparsity} if pattern is None else {"pattern": pattern}
    sparsify.run(SparsifyConfig(**amount), model, tokens(), out, Context())
    return out


def quantized(model: Path, out: Path, *, pattern: str | None = None, **settings: Any) -> Path:
    pruning = SparsifyConfig(pattern=pattern) if pattern else SparsifyConfig(sparsity=0.5)
    quantize.run(QuantizeConfig(**{"group_size": 64, **settings}), model, tokens(), out, Context(), sparsify=pruning)
    return out


def returns(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Pack and unpack, compare every file, and return the archive's result."""
    made = pack(folder, tmp_path / "archive")
    result: dict[str, Any] = made.manifest["result"]
    assert result["packed_bytes"] == sum(f.stat().st_size for f in (tmp_path / "archive").rglob("*.safetensors"))
    assert file_digests(unpack(tmp_path / "archive", tmp_path / "back")) == file_digests(folder)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".partial")]
    return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_float_model(arch: str, dtype: str, tiny_model: Any, tmp_path: Path) -> None:
    folder = sparse(tiny_model(arch, dtype), tmp_path / "sparse")
    counts = returns(folder, tmp_path)["tensors"]
    pruned = len(load_file(folder / "sqft" / "mask.safetensors"))
    assert (counts["bitmask"], counts["mask"], counts["2:4"]) == (pruned, pruned, 0)


def test_two_of_four_is_found(tiny_model: Any, tmp_path: Path) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse", pattern="2:4")
    assert returns(folder, tmp_path)["tensors"]["2:4"] > 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_quantised_model(
    bits: int, form: str, symmetric: bool, pattern: str | None, tiny_model: Any, tmp_path: Path
) -> None:
    folder = quantized(
        tiny_model("qwen2", **WIDE), tmp_path / "q", bits=bits, format=form, symmetric=symmetric, pattern=pattern
    )
    counts = returns(folder, tmp_path)["tensors"]
    weights = len(PackedCheckpoint(folder).shapes)
    codes = [file for file in (tmp_path / "archive").glob("*.packed.safetensors")]
    layouts = [
        ArchiveFile(file).layout(n) for file in codes for n in ArchiveFile(file).tensors if "packed" in n or "qw" in n
    ]
    assert layouts == ["bitmask" if pattern is None else "2:4"] * weights
    assert counts["mask"] == weights


def test_codes_of_other_widths_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3-bit weights; archives hold weights of 4, 8, 16 and 32 bits"):
        pack(quantized(tiny_model("llama", **WIDE), tmp_path / "q", bits=3), tmp_path / "archive")


def test_shards_and_minus_zero_and_other_files_come_back(tiny_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "shards"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", "bfloat16"))
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[:, ::2] = 0
    weight[0, 0] = -0.0
    model.save_pretrained(source, max_shard_size="50KB")
    shutil.copy(tiny_model("llama") / "tokenizer.json", source)
    (source / "README.md").write_text("mine\n")
    (source / "more").mkdir()
    (source / "more" / "notes.txt").write_text("mine too\n")
    assert len(list(source.glob("*.safetensors"))) > 1
    returns(source, tmp_path)
    again = Checkpoint(tmp_path / "archive").read("model.layers.0.mlp.up_proj.weight")
    assert struct.pack("<h", int(again.view(torch.int16)[0, 0])) == b"\x00\x80"


def test_an_archive_stands_for_the_model(tiny_model: Any, tmp_path: Path) -> None:
    folder = quantized(tiny_model("llama", "bfloat16", **WIDE), tmp_path / "q")
    pack(folder, tmp_path / "archive")
    plain, packed = Checkpoint(folder), Checkpoint(tmp_path / "archive")
    assert plain.entries.keys() == packed.entries.keys()
    for name in plain.entries:
        assert torch.equal(plain.read(name), packed.read(name)), name
    for weight in PackedCheckpoint(tmp_path / "archive").shapes:
        for read in (load_mask, lambda base, name: load_start(base, name, "compensated")):
            ours, theirs = read(folder, weight), read(tmp_path / "archive", weight)
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)
    facts, before = inspect_model(tmp_path / "archive"), inspect_model(folder)
    assert facts.pop("size_bytes") == (tmp_path / "archive" / "model.packed.safetensors").stat().st_size
    before.pop("size_bytes")
    assert facts == before


@pytest.mark.parametrize("precision", ["float", "int4"])
def test_an_archive_is_a_base_to_merge_into_and_verify_against(precision: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", "bfloat16", **WIDE)
    base = sparse(model, tmp_path / "base") if precision == "float" else quantized(model, tmp_path / "base")
    archive = pack(base, tmp_path / "archive").path
    adapted = get_peft_model(
        load_model(base, packed=True),
        SqftConfig(
            kind="sparse" if precision == "float" else "quantized", r=4, lora_alpha=8, target_modules=["q_proj"],
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    for layer in sqft_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    prompt = torch.arange(40).view(2, 20)
    live = load_model(archive, tmp_path / "adapter")(prompt).logits
    assert torch.equal(live, load_model(base, tmp_path / "adapter")(prompt).logits)
    for place, out in ((base, "merged"), (archive, "from_archive")):
        merge.run(MergeConfig(), place, tmp_path / "adapter", tmp_path / out, Context())
    for name in ("model.safetensors", "sqft/mask.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "from_archive" / name).read_bytes()
    pack(tmp_path / "merged", tmp_path / "merged_archive")
    for merged in ("from_archive", "merged_archive"):
        result = verify.run(
            VerifyConfig(prompts=2),
            tmp_path / merged,
            archive,
            tmp_path / "adapter",
            tmp_path / f"{merged}.json",
            Context(),
        )
        assert result["passed"], result["checks"]


def test_what_does_not_shrink_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"too few zeros to shrink.*weights of 16 bits shrink from 6.25 % zeros on"):
        pack(tiny_model("llama", "bfloat16"), tmp_path / "archive")
    quantize.run(QuantizeConfig(group_size=16), tiny_model("llama"), tokens(), tmp_path / "q", Context())
    with pytest.raises(InputError, match=r"weights of 4 bits shrink from 25 % zeros on"):
        pack(tmp_path / "q", tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


def test_an_archive_is_not_packed_again_nor_a_model_unpacked(tiny_model: Any, tmp_path: Path) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse")
    made = pack(folder, tmp_path / "archive")
    with pytest.raises(InputError, match="is an archive already"):
        pack(tmp_path / "archive", tmp_path / "twice")
    with pytest.raises(InputError, match="is no archive"):
        unpack(folder, tmp_path / "back")
    assert pack(folder, tmp_path / "archive").digest == made.digest  # finished
    unpack(tmp_path / "archive", tmp_path / "back")
    with pytest.raises(InputError, match="already exists"):
        unpack(tmp_path / "archive", tmp_path / "back")


def test_interrupted_packing_goes_on(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse")
    straight = file_digests(pack(folder, tmp_path / "straight").path)
    packed: list[str] = []
    real = pack_module.pack_file

    def once(source: Path, *more: Any) -> None:
        if packed:
            raise KeyboardInterrupt
        packed.append(source.name)
        real(source, *more)

    monkeypatch.setattr(pack_module, "pack_file", once)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "archive")
    assert not (tmp_path / "archive").exists()
    rest: list[str] = []
    monkeypatch.setattr(pack_module, "pack_file", lambda source, *more: (rest.append(source.name), real(source, *more)))
    found = file_digests(pack(folder, tmp_path / "archive").path)
    assert (packed, rest) == (["model.safetensors"], ["mask.safetensors"])
    assert {k: v for k, v in found.items() if "manifest" not in k} == {
        k: v for k, v in straight.items() if "manifest" not in k
    }


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_every_flipped_bit_of_masks_and_offsets_is_found_at_opening(
    pattern: str | None, tiny_model: Any, tmp_path: Path
) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse", pattern=pattern)
    file = pack(folder, tmp_path / "archive").path / "model.packed.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    places = [n for n in header if n.endswith((".mask", ".offsets", ".patterns"))]
    assert places
    for name in places[:6]:
        start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
        for byte in {start, (start + stop) // 2, stop - 1}:
            for bit in (0, 7):
                spoilt = bytearray(content)
                spoilt[byte] ^= 1 << bit
                file.write_bytes(spoilt)
                with pytest.raises(InputError, match="checksum"):
                    ArchiveFile(file)
    file.write_bytes(content)
    ArchiveFile(file)


def rewrite(file: Path, change: Any) -> None:
    """Change an archive's tensors and notes, and make its checksums fit."""
    from safetensors.torch import save_file

    from sqft.storage.layouts import Packed

    tensors = load_file(file)
    with safe_open(str(file), framework="pt") as stream:
        metadata = dict(stream.metadata())
    notes = json.loads(metadata["sqft.archive"])
    change(tensors, notes)
    for name, note in notes["tensors"].items():
        parts = {s: tensors[name + s] for s in (".mask", ".offsets", ".patterns") if name + s in tensors}
        note["crc32"] = Packed("bitmask", parts).crc() if parts else 0
    metadata["sqft.archive"] = json.dumps(notes)
    save_file(tensors, file, metadata)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t[f"{NAME}.offsets"].add_(1), r"offsets are not what .*mask counts"),
        (lambda t, n: t[f"{NAME}.mask"].bitwise_xor_(1), r"offsets are not what .*mask counts"),
        (lambda t, n: t.update({f"{NAME}.values": t[f"{NAME}.values"][:-16].clone()}), r"values where \d+ are counted"),
        (lambda t, n: t.update({f"{NAME}.mask": t[f"{NAME}.mask"][1:].clone()}), r"has shape .*and needs"),
        (lambda t, n: t.pop(f"{NAME}.values"), "no archive that can be read"),
        (lambda t, n: n.update(version=2), r"version 2, this sqft reads 1"),
        (lambda t, n: n["tensors"].pop(NAME), "no archive that can be read"),
        (lambda t, n: n["tensors"][NAME].update(layout="rle"), "no archive that can be read"),
    ],
)
def test_an_archive_that_contradicts_itself_is_refused(
    change: Any, message: str, tiny_model: Any, tmp_path: Path
) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse")
    file = pack(folder, tmp_path / "archive").path / "model.packed.safetensors"
    rewrite(file, lambda t, n: None)
    ArchiveFile(file)
    rewrite(file, change)
    with pytest.raises(InputError, match=message):
        ArchiveFile(file)


def test_a_pattern_that_is_none_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse", pattern="2:4")
    file = pack(folder, tmp_path / "archive").path / "model.packed.safetensors"
    rewrite(file, lambda t, n: t[f"{NAME}.patterns"].fill_(255))
    with pytest.raises(InputError, match="pattern that is none of the 6"):
        ArchiveFile(file)


def test_changed_values_are_found_when_unpacking(tiny_model: Any, tmp_path: Path) -> None:
    folder = sparse(tiny_model("llama", "bfloat16"), tmp_path / "sparse")
    archive = pack(folder, tmp_path / "archive").path
    rewrite(archive / "model.packed.safetensors", lambda t, n: t[f"{NAME}.values"].add_(1))
    with pytest.raises(InputError, match=r"model.packed.safetensors has changed"):
        unpack(archive, tmp_path / "back")
    manifest = json.loads((archive / "sqft" / "manifest.json").read_text())
    manifest["files"]["model.packed.safetensors"] = file_digests(archive)["model.packed.safetensors"]
    manifest["digest"] = digest_names(manifest["files"])
    (archive / "sqft" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"does not give model.safetensors back"):
        unpack(archive, tmp_path / "back")
    assert not (tmp_path / "back").exists()
