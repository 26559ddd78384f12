"""What a base folder keeps beside its weights: masks, and where quantisation-aware training starts.

`sqft/mask.safetensors` holds the packed mask of each pruned weight, `sqft/start.safetensors` the int8 offset of each
quantised weight inside its code's bin (the float weight just before rounding). Keys are on-disk weight names.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from sqft import processes
from sqft.artifact import MANIFEST, Artifact, digest_input
from sqft.core.mask import pack_mask, unpack_mask
from sqft.errors import InputError, Problems
from sqft.storage.allocate import allocate_file
from sqft.storage.archive import ArchiveFile, open_archive, stored, unpack_file
from sqft.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

MASK_FILE = Path("sqft") / "mask.safetensors"
START_FILE = Path("sqft") / "start.safetensors"
SPARSE_FROM = 0.25
"""Share of exact zeros from which a float base without a stored mask counts as sparse."""


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file of a base folder.

    Raises:
        InputError: it is damaged; names it.
    """
    archive = stored(file)
    try:
        if archive is not None and archive != file:
            yield _Archived(open_archive(archive), Checkpoint(file.parent.parent))
        else:
            with safe_open(str(file), framework="pt") as stream:
                yield stream
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({error}); make the folder again, or bring the file back") from error


@dataclass(frozen=True)
class _Archived:
    """A file in an archive, with the functions of safetensors' open file that are used here."""

    file: ArchiveFile
    model: Checkpoint

    def keys(self) -> list[str]:
        return list(self.file.tensors)

    def metadata(self) -> dict[str, str] | None:
        metadata: dict[str, str] | None = json.loads(self.file.header).get("__metadata__")
        return metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.tensors[name]["shape"])

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.read(name, self.model)


@lru_cache(maxsize=4)
def _open_masks(file: Path, mtime_ns: int) -> dict[str, tuple[int, ...]]:
    with _opened(file) as masks:
        metadata = masks.metadata() or {}
        try:
            shapes = {name: tuple(int(n) for n in metadata[name].split(",")) for name in masks.keys()}
        except (KeyError, ValueError) as error:
            raise InputError(f"{file}: has no shape for {error}; it is no file of masks that sqft wrote") from error
        for name, shape in shapes.items():
            found = masks.shape(name) if isinstance(masks, _Archived) else tuple(masks.get_slice(name).get_shape())
            if not shape or found != _packed_shape(shape):
                raise InputError(f"{file}: the mask of {name} has {list(found)} bytes, its shape {list(shape)} others")
        return shapes


def _matching(name: str, known: Collection[str]) -> str | None:
    """Return `name`, or it without its first part ('model.', 'transformer.'), whichever is known."""
    return next((key for key in (name, name.partition(".")[2]) if key in known), None)


def load_mask(base: str | Path | None, name: str) -> torch.Tensor | None:
    """Return the stored mask of a weight in its on-disk layout, or None where the base has none for it.

    Args:
        base: the base model's folder.
        name: the weight's name; a prefix that the checkpoint lacks ('model.', 'transformer.') is tolerated.
    """
    file = Path(base or "") / MASK_FILE
    place = stored(file) if base else None
    if place is None:
        return None
    shapes = _open_masks(file, place.stat().st_mtime_ns)
    found = _matching(name, shapes)
    if found is None:
        return None
    with _opened(file) as masks:
        return unpack_mask(masks.get_tensor(found), shapes[found][-1])


def packed_masks(base: Path) -> Callable[[str], torch.Tensor | None]:
    """Return what reads the stored mask of a weight of a plain folder, packed; None where there is none for it."""
    file = base / MASK_FILE
    if not file.is_file():
        return lambda _: None
    shapes, masks = _open_masks(file, file.stat().st_mtime_ns), Checkpoint(base, [str(MASK_FILE)])
    return lambda name: masks.read(name) if name in shapes else None


class MaskFile:
    """A model folder's masks, written as they come: which there are is known once all of them have come.

    They wait behind each other in a file beside the final one, which takes over from its end, so that neither memory
    nor disk holds them twice. Equal masks give equal bytes, which safetensors' own writer does not promise.
    """

    def __init__(self, folder: Path) -> None:
        """Take the model's folder; without masks nothing is written to it."""
        self._file = folder / MASK_FILE
        self._waiting = self._file.with_suffix(".waiting")
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def write(self, name: str, mask: torch.Tensor) -> None:
        """Add the bool mask [..., I] of an on-disk weight, in its layout on disk; the first process alone writes it."""
        if not processes.first():
            return
        self._waiting.parent.mkdir(exist_ok=True)
        with open(self._waiting, "ab") as stream:
            stream.write(pack_mask(mask).cpu().contiguous().numpy().data)
        self._shapes[name] = tuple(mask.shape)

    def finish(self) -> None:
        """Write the file, if there are masks."""
        if not self._shapes:
            return
        packed = {name: _packed_shape(shape) for name, shape in self._shapes.items()}
        metadata = {name: ",".join(str(n) for n in shape) for name, shape in self._shapes.items()}
        allocate_file(self._file, {name: (torch.uint8, shape) for name, shape in packed.items()}, metadata)
        written = Checkpoint(self._file.parent.parent, [str(MASK_FILE)])
        end = self._waiting.stat().st_size
        with open(self._waiting, "r+b") as stream:
            for name, shape in reversed(packed.items()):
                end -= math.prod(shape)
                stream.seek(end)
                written.write(name, torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8).view(shape))
                stream.truncate(end)
        self._waiting.unlink()


def _packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], math.ceil(shape[-1] / 8))


def copy_masks(source: Path, target: Path) -> None:
    """Copy the masks of a model folder, if it has some."""
    place = stored(source / MASK_FILE)
    if place is None:
        return
    (target / MASK_FILE).parent.mkdir(exist_ok=True)
    if place == source / MASK_FILE:
        shutil.copyfile(place, target / MASK_FILE)
    else:
        unpack_file(open_archive(place), target / MASK_FILE, Checkpoint(source))


def read_masks(file: Path, source: Checkpoint, targeted: Collection[str]) -> dict[str, torch.Tensor]:
    """Read masks made elsewhere: packed ones of ours, or plain bool or 0/1 tensors; keys are on-disk weight names.

    Args:
        file: the masks.
        source: the model's tensors.
        targeted: on-disk names of the weights that may be masked.

    Returns:
        {on-disk weight name: packed mask, uint8}: a bit a weight.

    Raises:
        InputError: unreadable, no weight of the model, no target, or another shape or values than a mask's; all at
            once.
    """
    try:
        with safe_open(str(file), framework="pt") as stream, Problems(f"sparsify.mask {file}") as problems:
            return _packed_masks(stream, source, targeted, problems)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"sparsify.mask {file}: cannot be read as safetensors ({error})") from error


def _packed_masks(
    stream: Any, source: Checkpoint, targeted: Collection[str], problems: Problems
) -> dict[str, torch.Tensor]:
    """Return the packed masks of an open file, of which one is unpacked at a time."""
    metadata, keys = stream.metadata() or {}, list(stream.keys())
    masks, others = {}, []
    for key in keys:
        name = key if key in source.entries else f"{key}.weight"
        if name not in source.entries:
            problems.add(f"{key} is no weight of the model")
            continue
        if name not in targeted:
            others.append(key)
            continue
        shape = source.entries[name].shape
        tensor = stream.get_tensor(key)
        mask = unpack_mask(tensor, shape[-1]) if key in metadata else tensor
        if tuple(mask.shape) != shape:
            problems.add(f"{key} has shape {list(mask.shape)}, the weight {list(shape)}")
        elif not bool(((mask == 0) | (mask == 1)).all()):
            problems.add(f"{key} has values other than 0 and 1")
        else:
            masks[name] = pack_mask(mask.bool())
    if others:
        listed = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        problems.add(
            f"{len(others)} of its {len(keys)} masks are of weights that are no targets: {listed}; take them "
            "out of the file, or choose them with sparsify.targets and sparsify.ignore"
        )
    return masks


def load_start(base: str | Path | None, name: str, start: str) -> torch.Tensor | None:
    """Return the starting weight of quantisation-aware training, in the form that QuantizedWeight takes.

    Args:
        base: the quantised base's folder.
        name: the weight's name, as in :func:`load_mask`.
        start: `dequantized` (None is returned), `compensated` (int8 offsets), or `float` (the weight that was
            quantised, found through the base's manifest; zeros where the mask is).

    Raises:
        InputError: the base has no such starting weight, or the float model has moved or changed.
    """
    if start == "dequantized":
        return None
    if start == "float":
        return _float_start(Path(base or ""), name)
    file = Path(base or "") / START_FILE
    if not base or stored(file) is None:
        raise InputError(
            f"base {base}: has no {START_FILE}, the weights before rounding; quantise with sqft quantize, or use "
            "finetune.start: dequantized"
        )
    with _opened(file) as offsets:
        found = _matching(name, set(offsets.keys()))
        if found is None:
            raise InputError(f"base {base}: {START_FILE} has no {name}; the base is incomplete, quantise it again")
        tensor: torch.Tensor = offsets.get_tensor(found)
    return tensor


def _float_start(base: Path, name: str) -> torch.Tensor:
    source = Path(float_source(base))
    checkpoint = Checkpoint(source)
    found = _matching(name, checkpoint.entries)
    if found is None:
        raise InputError(f"model {source}: has no {name}, from which training was to start")
    weight = checkpoint.read(found)
    mask = load_mask(base, name)
    return weight if mask is None else weight * mask


def float_source(base: Path) -> str:
    """Return the folder of the float model that a base was quantised from.

    Raises:
        InputError: the base names none, or it is gone or has changed.
    """
    if not (base / MANIFEST).is_file():
        raise InputError(
            f"base {base}: was not quantised by sqft, so the float weights are unknown; use finetune.start: dequantized"
        )
    recorded = Artifact.open(base).manifest["inputs"].get("model", {})
    path = Path(recorded.get("path", ""))
    if not path.exists():
        path = base.resolve().parent / path.name  # a run's folder that was renamed
    if not path.exists():
        raise InputError(f"base {base}: was quantised from {path}, which is gone; bring it back or use another start")
    if digest_input(path) != recorded["digest"]:
        raise InputError(f"base {base}: was quantised from {path}, which has changed since; use another start")
    return str(path)
