"""Masks on the way: written as they come, read a bit a weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sqft.core.mask import pack_mask
from sqft.errors import InputError
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.masks import MASK_FILE, MaskFile, load_mask, read_masks


def some_masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (3, 17), "a.weight": (2, 5, 8), "c.weight": (1, 64)}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def test_masks_are_written_as_they_come_and_nothing_else_stays(tmp_path: Path) -> None:
    masks, file = some_masks(), MaskFile(tmp_path)
    sizes = []
    for name, mask in masks.items():
        file.write(name, mask)
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
    assert sizes == [9, 9 + 10, 9 + 10 + 8], "each is on disk when it has been given"
    assert not [value for value in vars(file).values() if isinstance(value, torch.Tensor)]
    file.finish()
    assert [path.name for path in (tmp_path / "sqft").iterdir()] == [MASK_FILE.name]
    for name, mask in masks.items():
        assert name in file
        loaded = load_mask(tmp_path, name)
        assert loaded is not None
        assert torch.equal(loaded, mask)
    assert "d.weight" not in file


def test_a_model_without_masks_gets_no_file(tmp_path: Path) -> None:
    MaskFile(tmp_path).finish()
    assert not list(tmp_path.iterdir())


def test_masks_made_elsewhere_are_read_packed(tmp_path: Path) -> None:
    mask = some_masks()["b.weight"]
    save_file({"b.weight": torch.zeros(3, 17), "e.weight": torch.zeros(3, 17)}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    for given in (mask, mask.float()):
        save_file({"b": given.contiguous()}, tmp_path / "given.safetensors")
        found = read_masks(tmp_path / "given.safetensors", source, {"b.weight"})
        assert list(found) == ["b.weight"]
        assert torch.equal(found["b.weight"], pack_mask(mask)), "a bit a weight"
    save_file({"b": mask.float() * 2, "e.weight": mask}, tmp_path / "given.safetensors")
    with pytest.raises(
        InputError, match=r"(?s)b has values other than 0 and 1.*1 of its 2 masks are of weights that are no"
    ):
        read_masks(tmp_path / "given.safetensors", source, {"b.weight"})
