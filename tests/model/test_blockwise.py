"""A model run block by block answers as the whole model does, to the bit, and has one block in memory at a time."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES
from sqft.errors import InputError
from sqft.model.blockwise import BlockwiseModel, NotBlockwise
from sqft.model.load import open_model
from sqft.model.lockstep import Forward

SEQUENCES = [[1, 2, 3, 4, 5, 6, 7], [9], [5, 250, 30, 7] * 10]


@torch.no_grad()
def whole(folder: Path, widened: torch.dtype | None = None) -> list[torch.Tensor]:
    model: Any = open_model(folder)
    if widened is not None:
        model = model.to(widened)
    return [model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_answers_as_a_whole(arch: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(arch, "bfloat16")
    found = list(BlockwiseModel(folder).logits(SEQUENCES))
    assert same(found, whole(folder))
    assert not same(found, [row + 1 for row in found])


@pytest.mark.parametrize(
    ("arch", "dtype", "wider"), [("gemma2", "bfloat16", "float32"), ("llama", "float32", "float64")]
)
def test_a_wider_dtype_is_that_of_the_whole(arch: str, dtype: str, wider: str, tiny_model: Callable[..., Path]) -> None:
    folder, widened = tiny_model(arch, dtype), getattr(torch, wider)
    found = list(BlockwiseModel(folder, widened=widened).logits(SEQUENCES))
    assert {row.dtype for row in found} == {widened}
    assert same(found, whole(folder, widened))


def parameter_bytes() -> int:
    """Return the bytes of all parameters in this process that have data."""
    found = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and not x.is_meta]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def waiting() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, Forward)]


def test_one_block_has_weights_at_a_time_and_is_read_once(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", "bfloat16", num_hidden_layers=5)
    expected = whole(folder)
    model = BlockwiseModel(folder)
    checkpoint = model._names.checkpoint
    reading, read, held = checkpoint.read, [], {}
    gc.collect()
    before = parameter_bytes()

    def noted(name: str) -> torch.Tensor:
        read.append(name)
        held[name] = parameter_bytes() - before
        return reading(name)

    checkpoint.read = noted  # type: ignore[method-assign]
    answers = model.logits(SEQUENCES)
    assert "lm_head.weight" not in read, "the output layer is read once its turn has come"
    assert len(waiting()) == len(SEQUENCES)
    assert same(list(answers), expected)
    assert not waiting()
    assert sorted(read) == sorted(checkpoint.entries), "each tensor is read once, for all sequences"
    blocks = [name.split(".")[2] for name in read if ".layers." in name]
    assert blocks == sorted(blocks), "block after block"
    norm = checkpoint.entries["model.norm.weight"]
    assert max(held.values()) == norm.stop - norm.start, "what was read before a part is gone but for the last norm"


def test_what_is_missing_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama", "bfloat16")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        BlockwiseModel(tmp_path).logits(SEQUENCES)
    assert not waiting(), "forwards that wait are ended"


def test_a_model_whose_forward_does_not_run_in_parts_says_so(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockwiseModel(tiny_model("llama", "bfloat16"))
    monkeypatch.setattr(type(model.network), "forward", lambda self, **_: self.model.layers[0].self_attn.q_proj(1))
    with pytest.raises(NotBlockwise, match="does not run in parts"):
        model.logits(SEQUENCES)


def test_blocks_that_share_weights_are_not_run_apart(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.model import blockwise

    def shared(*args: Any, **options: Any) -> Any:
        model = skeleton(*args, **options)
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    skeleton = blockwise.skeleton
    monkeypatch.setattr(blockwise, "skeleton", shared)
    with pytest.raises(NotBlockwise, match="share weights"):
        BlockwiseModel(tiny_model("llama", "bfloat16"))
