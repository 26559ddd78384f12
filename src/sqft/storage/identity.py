"""What identifies a base: the digests by which an adapter remembers what it was trained on."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

from sqft.artifact import digest_input
from sqft.digests import digest_file
from sqft.errors import InputError
from sqft.storage.archive import open_archive, stored
from sqft.storage.integers import PackedCheckpoint, quantization_config
from sqft.storage.masks import MASK_FILE, START_FILE, float_source


def identity(base: str | Path, start: str | None = None) -> dict[str, str]:
    """Return the digests by which an adapter remembers its base: of codes, grid, mask and start, or of all of it.

    Args:
        base: the base's folder.
        start: the starting weight that training uses, for a quantised base.
    """
    base = Path(base)
    digests = {"base": digest_input(base)}
    if quantization_config(base) is None:
        return digests
    # By the digest just made, so that another content is never taken for what was hashed before.
    digests |= _grid_digests(base.resolve(), digests["base"])
    for what, file in (("mask", MASK_FILE), ("start", START_FILE)):
        place = stored(base / file)
        if place is not None and (what == "mask" or start == "compensated"):
            digests[what] = digest_file(place) if place == base / file else open_archive(place).sha256
    if start == "float":
        digests["start"] = digest_input(float_source(base))
    return digests


@lru_cache(maxsize=4)
def _grid_digests(base: Path, _digest: str) -> dict[str, str]:
    """Return the digests of a quantised base's codes, and of its scales and zero points."""
    packed = PackedCheckpoint(base)
    codes, grid = hashlib.sha256(), hashlib.sha256()
    for name, weight in sorted(packed.stored_names().items()):
        part = codes if name == packed.codes_name(weight) else grid
        part.update(name.encode())
        part.update(packed.checkpoint.read(name).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"codes": codes.hexdigest(), "scales and zero points": grid.hexdigest()}


def check_identity(
    base: str | Path, trained_on: dict[str, str], start: str | None, where: str = "the adapter "
) -> None:
    """Refuse a base whose digests are not those that an adapter remembers; see :func:`identity`.

    Raises:
        InputError: names the parts that differ.
    """
    found = identity(base, start)
    parts = [part for part in trained_on if part != "base"] or ["base"]
    differing = [part for part in parts if found.get(part) != trained_on[part]]
    if differing:
        what = f"; what differs: {', '.join(differing)}" if differing != ["base"] else ""
        raise InputError(
            f"{where}was trained on another base (digest {trained_on['base'][:12]}) than {base} "
            f"(digest {found['base'][:12]}){what}; give the base that its manifest names"
        )
