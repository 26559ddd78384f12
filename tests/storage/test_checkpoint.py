"""Checkpoints: read and patch against the safetensors library, and every way a download can be broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft.adapters.attach import load_model
from sqft.context import Context
from sqft.errors import InputError
from sqft.model.sources import _read_once, local_folder
from sqft.storage.checkpoint import INDEX, Checkpoint, copy_model


def sharded(source: Path, target: Path) -> Path:
    load_model(source).save_pretrained(target, max_shard_size="20KB")
    return target


def test_read_and_write_agree_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.arange(4), "c": torch.randn(2, 2, 2).half(), "d": torch.randn(7)
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    checkpoint.write("c", tensors["c"] * 2)
    after = load_file(tmp_path / "model.safetensors")
    assert torch.equal(after["c"], tensors["c"] * 2)
    assert all(torch.equal(after[n], tensors[n]) for n in "abd")
    with pytest.raises(ValueError, match=r"stored as torch\.bfloat16"):
        checkpoint.write("a", torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"\[3, 5\], given .* \[5, 3\]"):
        checkpoint.write("a", torch.zeros(5, 3).bfloat16())


def test_a_sharded_copy_is_the_original_to_the_byte(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = sharded(tiny_model("llama"), tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    copy = copy_model(source, tmp_path / "copy")
    assert len({entry.file for entry in copy.entries.values()}) > 1
    assert not (tmp_path / "copy" / "pytorch_model.bin").exists()
    for path in source.iterdir():
        if path.suffix != ".bin":
            assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


def test_every_broken_shard_is_reported_at_once(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = sharded(tiny_model("llama"), tmp_path / "source")
    first, second, third, *_ = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
    (source / first).unlink()
    data = (source / second).read_bytes()
    (source / second).write_bytes(data[: len(data) - 40])
    (source / third).write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="3 problems") as error:
        Checkpoint(source)
    assert f"shard {first} is missing" in str(error.value)
    assert f"{second} is cut short" in str(error.value)
    assert f"{third} is cut short" in str(error.value)
    assert "download it again" in str(error.value)


def test_a_pickle_or_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor .*index\.json; download it again"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="a pickle: convert it with save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/folder", "no such folder"),
        ("package:no_such_package/x.gguf", "is not installed"),
        ("missing.gguf", "no such file"),
    ],
)
def test_an_unknown_model_is_refused(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        local_folder(model, tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        local_folder(str(tmp_path), tmp_path)


def test_a_hub_name_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder here nor reachable on the Hub"):
        local_folder("nobody/no-such-model-at-all", tmp_path)


def test_a_folder_is_itself(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    assert local_folder(str(folder), tmp_path) == folder
    shutil.copytree(folder, tmp_path / "x")
    assert Checkpoint(tmp_path / "x").size_bytes == Checkpoint(folder).size_bytes


def test_the_files_of_a_model_are_those_that_transformers_opens(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = sharded(tiny_model("llama"), tmp_path / "sharded")
    whole = {name: Checkpoint(folder).read(name) for name in Checkpoint(folder).entries}
    save_file(
        {name: tensor * 3 for name, tensor in whole.items()}, folder / "other.safetensors", metadata={"format": "pt"}
    )
    assert torch.equal(Checkpoint(folder).read("lm_head.weight"), whole["lm_head.weight"])  # the index's
    save_file(
        {name: tensor * 2 for name, tensor in whole.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    found = Checkpoint(folder)
    stock = load_model(folder)
    assert torch.equal(found.read("lm_head.weight"), stock.lm_head.weight)  # the single file's, as transformers has it
    assert torch.equal(found.read("lm_head.weight"), 2 * whole["lm_head.weight"])
    copy_model(folder, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").glob("*.safetensors*")) == ["model.safetensors"]


def test_an_index_does_not_lead_out_of_its_folder_or_lie(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = sharded(tiny_model("llama"), tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    shutil.copyfile(folder / right["weight_map"]["lm_head.weight"], tmp_path / "evil.safetensors")

    def named(file: str) -> None:
        index.write_text(json.dumps({**right, "weight_map": {**right["weight_map"], "lm_head.weight": file}}))

    for outside in ("../evil.safetensors", str(tmp_path / "evil.safetensors")):
        named(outside)
        with pytest.raises(InputError, match="outside the folder"):
            Checkpoint(folder)
    named(next(file for file in right["weight_map"].values() if file != right["weight_map"]["lm_head.weight"]))
    with pytest.raises(InputError, match=r"names lm_head\.weight, not in the files it says"):
        Checkpoint(folder)
    index.write_text("[]")
    with pytest.raises(InputError, match="is not a shard index"):
        Checkpoint(folder)


def test_an_adapter_inside_a_model_folder_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "m")
    Checkpoint(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter too.*merge it first"):
        Checkpoint(tmp_path / "m")


def test_named_chat_templates_come_along_and_strange_files_do_not(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "m")
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    for name in ("consolidated.00.pth", "model.onnx", "pytorch_model.bin.index.json", "training_args.bin"):
        (tmp_path / "m" / name).write_text("x")
    copy_model(tmp_path / "m", tmp_path / "copy")
    found = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert "additional_chat_templates/tool_use.jinja" in found
    assert "tokenizer.json" in found
    assert not {name for name in found if name.startswith(("consol", "model.onnx", "pytorch", "training"))}


@pytest.mark.parametrize("config", ["[]", "{", '"text"', "\xff"])
def test_a_damaged_config_is_one_message(config: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path / "m")


def test_a_revision_is_of_the_hub(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from sqft.artifact import describe

    with pytest.raises(InputError, match="revision is v1, which only a model of the Hub has"):
        local_folder(str(tiny_model("llama")), tmp_path, "v1")
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(tiny_model("llama"), snapshot)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **o: asked.append(o["revision"]) or str(snapshot)
    )
    assert local_folder("owner/name", tmp_path, "v1") == snapshot
    assert asked == ["v1"]
    assert describe("stage", {}, {"model": snapshot}, 0)["inputs"]["model"]["revision"] == commit


@pytest.mark.parametrize("tied_in_config", [True, False])
def test_tied_embeddings_are_what_is_stored(
    tied_in_config: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from sqft.recipe import QuantizeConfig
    from sqft.stages import quantize

    # gemma's own are tied; llama's are two matrices, whatever the config says.
    for arch in ("gemma", "llama"):
        folder = tmp_path / arch
        shutil.copytree(tiny_model(arch), folder)
        config = json.loads((folder / "config.json").read_text())
        if arch == "llama":
            (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied_in_config}))
        quantize.run(QuantizeConfig(method="rtn", group_size=16), folder, None, tmp_path / f"{arch}-int4", Context())
        stock, packed = load_model(tmp_path / f"{arch}-int4"), load_model(tmp_path / f"{arch}-int4", packed=True)
        tied = packed.get_input_embeddings().weight is packed.get_output_embeddings().weight
        assert tied == (arch == "gemma")
        ids = torch.arange(1, 20)[None]
        with torch.no_grad():
            assert torch.allclose(stock(ids).logits, packed(ids).logits, atol=1e-4)


def test_a_gguf_header_is_parsed_once_while_it_is_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    stock, table_of = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(RuntimeError, match="on the way"), _read_once():
        first = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is first
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is table
        raise RuntimeError("on the way")
    assert gguf.GGUFReader is stock
    assert gguf.get_tensor_name_map is table_of
    assert gguf.GGUFReader(file) is not first
