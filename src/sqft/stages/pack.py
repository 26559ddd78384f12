"""Pack a model folder so that its zeros take a bit or less, and unpack it to the same bytes.

Every safetensors file `X.safetensors` becomes `X.packed.safetensors` (see :mod:`sqft.storage.archive`), all else is
copied; the folder's own manifest is kept as `sqft/packed_manifest.json`. Every tensor is turned back and compared
before it is written. A folder that would not shrink is refused.

Unfinished work is kept by the file: the same command goes on with the files that are still missing.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqft.artifact import DESCRIPTION, MANIFEST, Artifact, Draft, partial_of
from sqft.digests import digest_file
from sqft.disk import check_space, discard, sync_all
from sqft.errors import InputError
from sqft.locks import making
from sqft.progress import progress
from sqft.stage import Stage
from sqft.storage.archive import SUFFIX, ArchiveFile, pack_file, place, unpack_file
from sqft.storage.checkpoint import Checkpoint
from sqft.storage.integers import PackedCheckpoint, quantization_config
from sqft.storage.layouts import PARTS, Codes, Packed, encode, encode_mask, gives_back
from sqft.storage.masks import MASK_FILE, packed_masks

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_ORIGINAL_MANIFEST = Path("sqft") / "packed_manifest.json"
_SAMPLED = 12
"""Weights that are packed to tell whether a model would shrink."""


def pack(model: str | Path, out: str | Path) -> Artifact:
    """Write a model folder's archive.

    Args:
        model: folder of a sparse model: 16-bit, INT8 or INT4.
        out: folder to make.

    Returns:
        The archive; its manifest's `result` has the bytes before and after, and how many tensors have each layout.

    Raises:
        InputError: no model folder, an archive already, or too few zeros to shrink.
    """
    model, out = Path(model), Path(out)

    def ready() -> _Packer:
        packer = _Packer(model)
        packer.check()
        check_space(out.parent, packer.size, "the archive")
        return packer

    return Stage.of("pack", out, {}, {"model": model}, seed=0).make(ready, partial(_write, model))


def _write(model: Path, packer: _Packer, draft: Draft) -> dict[str, Any]:
    """Fill the archive's folder, and return what its manifest says."""
    layouts: Counter[str] = Counter()
    packed = 0
    with progress(packer.size // 1_000_000, "packing", "MB") as advance:
        for file in _files(model):
            target = draft.path / _place(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                layouts += packer.pack(file, draft.checkpoints, target, lambda n: advance(n // 1_000_000))
                packed += target.stat().st_size
            else:
                shutil.copyfile(model / file, target)
    logger.info(
        "packed %.1f MB into %.1f MB (%.2f times smaller): %d tensors as bitmasks, %d as 2:4, %d as they were",
        packer.size / 1e6, packed / 1e6, packer.size / packed, layouts["bitmask"], layouts["2:4"], layouts["plain"],
    )  # fmt: skip
    return {"bytes": packer.size, "packed_bytes": packed, "tensors": {name: layouts[name] for name in PARTS}}


def unpack(archive: str | Path, out: str | Path) -> Path:
    """Write the folder that an archive was made of; every file's SHA-256 is compared.

    Args:
        archive: from :func:`pack`.
        out: folder to make.

    Raises:
        InputError: no archive, one that is damaged, or the folder exists.
    """
    archive, out = Path(archive), Path(out)
    if not list(archive.glob(f"*{SUFFIX}")):
        raise InputError(f"{archive}: is no archive: it has no *{SUFFIX}; give a folder that sqft pack made")
    record = Artifact.open(archive).check()
    check_space(out.parent, int(record.manifest["result"]["bytes"]), "the model")
    checkpoint = Checkpoint(archive)
    with making(out):
        if out.exists():
            raise InputError(f"{out}: already exists; delete it or choose another folder")
        partial_folder = partial_of(out)
        discard(partial_folder)
        try:
            for file in _files(archive):
                if file in (MANIFEST, DESCRIPTION):
                    continue
                target = partial_folder / (MANIFEST if file == _ORIGINAL_MANIFEST else file)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not file.name.endswith(SUFFIX):
                    shutil.copyfile(archive / file, target)
                    continue
                target = target.with_name(file.name.removesuffix(SUFFIX) + ".safetensors")
                packed = ArchiveFile(archive / file)
                unpack_file(packed, target, checkpoint)
                if digest_file(target) != packed.sha256:
                    raise InputError(f"{archive}: {file} does not give {target.name} back; download the archive again")
            sync_all(partial_folder)
            os.rename(partial_folder, out)
        except BaseException:
            discard(partial_folder)
            raise
    return out


class _Packer:
    """What it takes to pack the files of one model folder."""

    def __init__(self, model: Path) -> None:
        if list(model.glob(f"*{SUFFIX}")):
            raise InputError(f"model {model}: is an archive already; sqft unpack gives the model back")
        self.model, self.checkpoint = model, Checkpoint(model)
        quantized = None if quantization_config(model) is None else PackedCheckpoint(model)
        if quantized is not None and quantized.scheme.bits not in (4, 8):
            raise InputError(
                f"model {model}: has {quantized.scheme.bits}-bit weights; archives hold weights of 4, 8, 16 and 32 bits"
            )
        self.codes = {} if quantized is None else dict(_codes(quantized))
        # Masks have the weights' names as floats; of a quantised weight the codes are stored.
        self.stored = {} if quantized is None else {w: quantized.codes_name(w) for w in quantized.shapes}
        self.weights = {codes: weight for weight, codes in self.stored.items()}
        self.masks = packed_masks(model)
        self._last = "", torch.empty(0)
        self.made: dict[str, ArchiveFile] = {}
        self.size = sum((model / file).stat().st_size for file in _files(model) if file.suffix == ".safetensors")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the model; zero points are asked for twice, as codes are packed and turned back."""
        if self._last[0] != name:
            self._last = name, self.checkpoint.read(name)
        return self._last[1]

    def kept(self, name: str) -> torch.Tensor:
        """Return the mask in the layout of a weight that is packed already, uint8 [O, ceil(I / 8)]."""
        return self.made[self.checkpoint.entries[name].file].kept(name)

    def layout(self, name: str, tensor: torch.Tensor, *, masks: bool) -> Packed:
        """Return a tensor in the layout that it will have, having turned it back."""
        if masks and (weight := self.stored.get(name, name)) in self.checkpoint.entries:
            packed = encode_mask(tensor, weight, self)
        elif masks:
            packed = encode(tensor, None, self)
        else:
            packed = encode(tensor, self.codes.get(name), self, self.masks(self.weights.get(name, name)))
        if not gives_back(packed, tensor, self):
            raise AssertionError(f"{name}: layout {packed.layout} does not give it back")
        return packed

    def pack(self, file: Path, finished_files: Path, target: Path, advance: Any) -> Counter[str]:
        """Write one file's archive, or take it from an earlier process that was interrupted."""
        name = "-".join(target.parts[-1:] if file.parent == Path() else [*file.parent.parts, target.name])
        done = finished_files / name
        if not done.is_file():
            finished_files.mkdir(parents=True, exist_ok=True)
            unfinished = done.with_name(f"{name}.unfinished")
            layout = partial(self.layout, masks=file == MASK_FILE)
            pack_file(self.model / file, unfinished, digest_file(self.model / file), layout, advance)
            os.rename(unfinished, done)
        os.link(done, target)
        self.made[str(file)] = made = ArchiveFile(target)
        return Counter(made.layout(tensor) for tensor in made.tensors)

    def check(self) -> None:
        """Pack a few weights and see whether they shrink.

        Raises:
            InputError: they do not; says how many zeros it takes.
        """
        names = [
            n for n, e in self.checkpoint.entries.items() if n in self.codes or (not self.codes and len(e.shape) == 2)
        ]
        names = names[:: max(1, len(names) // _SAMPLED)]
        before = after = 0
        for name in names:
            tensor = self.checkpoint.read(name)
            packed = self.layout(name, tensor, masks=False)
            before, after = before + tensor.numel() * tensor.itemsize, after + packed.size
        if after >= before:
            bits = next((codes.bits for codes in self.codes.values()), 8 * self.checkpoint.dtype.itemsize)
            raise InputError(
                f"model {self.model}: has too few zeros to shrink: {len(names)} of its weights take {before} bytes, "
                f"and packed {after}. A mask takes one bit a weight, so weights of {bits} bits shrink from "
                f"{100 / bits:.3g} % zeros on. Prune the model with sqft sparsify; to send a dense one, compress the "
                "folder with zstd"
            )


def _codes(quantized: PackedCheckpoint) -> Iterator[tuple[str, Codes]]:
    """Yield each stored tensor of codes that an archive can pack, and how it holds them."""
    scheme = quantized.scheme
    for weight, (_, columns) in quantized.shapes.items():
        if columns * scheme.bits % 32:
            continue
        prefix = weight.removesuffix(".weight")
        group = scheme.group_size or columns
        if scheme.format == "gptq":
            codes = Codes(scheme.bits, group, f"{prefix}.qzeros", rows_last=True, less=scheme.least_zero)
        else:
            codes = Codes(scheme.bits, group, None if scheme.symmetric else f"{prefix}.weight_zero_point")
        yield quantized.codes_name(weight), codes


def _files(folder: Path) -> list[Path]:
    """Return a folder's files but the hidden ones, relative to it; those in `sqft/` last, since masks need weights."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = [file for file in found if not any(part.startswith(".") for part in file.parts)]
    return sorted(shown, key=lambda file: (len(file.parts), str(file)))


def _place(file: Path) -> Path:
    """Return where in an archive a file of a model folder lies."""
    if file == MANIFEST:
        return _ORIGINAL_MANIFEST
    return place(file) if file.suffix == ".safetensors" else file
