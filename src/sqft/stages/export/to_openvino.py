"""Write a quantised model as an OpenVINO folder that holds every weight exactly, and prove it.

OpenVINO's frontend takes packed 4-bit weights as they are; optimum-intel, which makes the folder, would decompress
them first and is kept from it (:mod:`intel_hook`). OpenVINO then reads the folder back: every 4-bit constant must be
the model's, to the bit, and the logits those of transformers in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sqft.artifact import partial_of
from sqft.disk import check_space, discard, read_json, sync_all
from sqft.errors import InputError, Problems
from sqft.locks import making
from sqft.model.load import embedding_rows, open_model
from sqft.stages.export.checks import quantized_config
from sqft.stages.export.intel import Optimum, given, install
from sqft.storage.checkpoint import plain_files
from sqft.storage.integers import PackedCheckpoint

logger = logging.getLogger(__name__)

MOST = 1e-3
"""By how much a logit may differ."""
_SEQUENCES, _LENGTH = 3, 32
_FLOAT = (
    "optimum-intel's own command writes it (optimum-cli export openvino), or quantise it first: sqft quantize MODEL "
    "QUANTIZED"
)


def run(model: Path, out: Path, place: Path | None = None) -> dict[str, Any]:
    """Write a model folder's OpenVINO folder.

    Args:
        model: folder of a quantised model.
        out: the folder to make.
        place: optimum-intel, as a folder or an interpreter; None is the pinned one.

    Returns:
        The proof: {linears, weights: how many were found equal to the bit, constants: 4-bit and scale constants
        compared, type, bits: a weight's, bytes: of the folder, floats: other tensors found equal, computed: those that
        are not there as they are (transposed, or Gemma's norms plus one), tokens, logits: the largest difference}.

    Raises:
        InputError: the model cannot be exported (every reason), or the exporter failed, or the proof did; there is
            then no folder.
    """
    packed, optimum = _check(model, out, place)
    with making(out):
        work = partial_of(out)
        discard(work)
        work.mkdir()
        try:
            made = work / "model"
            logger.info("optimum-intel writes %s", out.name)
            with plain_files(model) as plain:
                optimum.run(work / "job.json", model=str(plain.absolute()), out=str(made))
            logger.info("comparing every weight of the folder with the model's, and logits with transformers'")
            proof = _prove(made, model, packed, optimum, work)
            sync_all(made)
            if out.exists():
                raise InputError(f"{out} was made meanwhile; delete it or choose another name")
            made.rename(out)
        finally:
            discard(work)
    return proof


def _check(model: Path, out: Path, place: Path | None) -> tuple[PackedCheckpoint, Optimum]:
    """Return what the work needs.

    Raises:
        InputError: every problem that can be known before it.
    """
    if not model.is_dir():
        raise InputError(f"model {model}: no such folder")
    packed, optimum = None, None
    with Problems(f"export of {model}") as problems:
        if out.suffix == ".gguf":
            problems.add(f"{out} ends in .gguf, and OpenVINO's form is a folder; leave --format openvino out, or .gguf")
        if out.exists():
            problems.add(f"{out} already exists; delete it or choose another name")
        optimum = problems.attempt(lambda: given(place))
        config = problems.attempt(lambda: quantized_config(model, _FLOAT))
        if config is not None:
            packed = problems.attempt(lambda: PackedCheckpoint(model))
            if packed is not None:
                _check_grid(packed, problems)
            # The pinned packages are installed only for what is otherwise in order.
            if optimum is None and place is None and not list(problems):
                optimum = install()
            if optimum is not None:
                _check_architecture(config, optimum, problems)
    if packed is None or optimum is None:
        raise AssertionError("a check failed and said nothing")
    check_space(out.parent, 2 * packed.checkpoint.size_bytes, "the OpenVINO folder, its 16-bit tensors in 32,")
    return packed, optimum


def _check_grid(packed: PackedCheckpoint, problems: Problems) -> None:
    """Add why OpenVINO's frontend does not take these integers as they are."""
    scheme = packed.scheme
    if scheme.format != "compressed-tensors":
        problems.add(
            f"is stored as {scheme.format}, which OpenVINO rounds anew; quantise with format: compressed-tensors"
        )
    if scheme.bits != 4:
        problems.add(f"has weights of {scheme.bits} bits; OpenVINO takes 4 as they are: quantise with bits: 4")
    if scheme.group_size is None:
        problems.add("its scales are those of whole rows; OpenVINO takes groups: quantise with group_size: 64")
    experts = [name for name in packed.shapes if ".experts." in name]
    if experts:
        problems.add(
            f"{len(experts)} quantised weights are experts' ({experts[0]}), which optimum-intel fuses as floats"
        )


def _check_architecture(config: dict[str, Any], optimum: Optimum, problems: Problems) -> None:
    named = config.get("model_type")
    known = problems.attempt(optimum.model_types)
    if known is not None and named not in known:
        problems.add(
            f"its config.json has the model_type {named!r}, which optimum-intel does not export; it knows "
            f"{len(known)}, such as llama; a newer one can be given with --converter"
        )


def _prove(made: Path, model: Path, packed: PackedCheckpoint, optimum: Optimum, work: Path) -> dict[str, Any]:
    """Compare a folder with the model.

    Raises:
        InputError: it holds something else, or computes something else.
    """
    reference = _Reference(model)
    answers, read = work / "logits.npy", work / "found.json"
    names = {"folder": str(made), "found": str(read), "logits": str(answers)}
    optimum.run(work / "job.json", **names, sequences=reference.sequences)
    found = read_json(read)
    proof = compare(found, packed)
    logits = np.load(answers)
    if logits.shape != reference.logits.shape:
        raise InputError(f"{made}: gives logits of shape {logits.shape}, transformers {reference.logits.shape}")
    difference = float(np.abs(logits - reference.logits).max())
    if not difference <= MOST:  # NaN is refused as well
        raise InputError(
            f"export of {model}: a logit differs by {difference:.2g} from transformers' (at most {MOST:g})"
        )
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    return {**proof, "bytes": size, "tokens": len(logits), "logits": difference}


class _Reference:
    """Logits of a few sequences of random tokens by transformers in float32, where s · (q − z) is exact."""

    def __init__(self, folder: Path) -> None:
        model = open_model(folder, dtype=torch.float32)
        shape = (_SEQUENCES, _LENGTH)
        drawn = torch.randint(0, embedding_rows(model), shape, generator=torch.Generator().manual_seed(0))
        self.sequences: list[list[int]] = drawn.tolist()
        with torch.no_grad():
            self.logits = torch.cat([model(input_ids=tokens[None]).logits[0] for tokens in drawn]).float().numpy()


def compare(found: dict[str, Any], packed: PackedCheckpoint) -> dict[str, Any]:
    """Compare what was read back with a quantised model folder's codes, scales and zero points.

    Args:
        found: what :func:`sqft.stages.export.intel_hook.read` returns.
        packed: the folder's.

    Returns:
        {format, linears, weights, constants, type, bits, floats, computed}.

    Raises:
        InputError: a constant is another, is missing, or is none of the folder's; all of them.
    """
    linears, constants = found["linears"], 0
    types: set[str] = set()
    with Problems(f"the OpenVINO folder is not the model {packed.folder}") as problems:
        for name, (rows, columns) in packed.shapes.items():
            there = linears.get(name)
            if there is None:
                problems.add(f"{name} is not in it as 4-bit constants")
                continue
            wanted, types = dict(_parts(packed, name)), types | {there["type"]}
            groups = columns // (packed.scheme.group_size or columns)
            if there["shape"] != [groups, columns // groups, rows]:
                problems.add(f"{name} has the shape {there['shape']} there, not {[groups, columns // groups, rows]}")
            for part, digest in wanted.items():
                constants += 1
                if there.get(part) != digest:
                    problems.add(f"{name}: its {part} are not the folder's")
            if "zeros" in there and "zeros" not in wanted:
                problems.add(f"{name} has zero points there, and none in the folder")
        for name in [*sorted(set(linears) - set(packed.shapes)), *found["other"]]:
            problems.add(f"{name} is quantised there, and not in the folder")
    floats = [digest in found["floats"] for digest in _float_digests(packed)]
    group = packed.scheme.group_size or 1
    return {
        "format": "openvino",
        "linears": len(packed.shapes),
        "weights": sum(rows * columns for rows, columns in packed.shapes.values()),
        "constants": constants,
        "type": "/".join(sorted(types)),
        "bits": round(4 + (32 if packed.scheme.symmetric else 36) / group, 4),
        "floats": sum(floats),
        "computed": len(floats) - sum(floats),
    }


def _parts(packed: PackedCheckpoint, name: str) -> Iterator[tuple[str, str]]:
    """Yield the SHA-256 of a weight's parts as OpenVINO lays them: groups, then their columns, then rows."""
    codes, grid = packed.read(name)
    yield "codes", _digest(codes.T)
    yield "scales", _digest(grid.scale_OG.float().T)
    if not packed.scheme.symmetric:
        yield "zeros", _digest(grid.zero_OG.T)


def _float_digests(packed: PackedCheckpoint) -> Iterator[str]:
    """Yield the SHA-256, as float32, of each tensor of the folder that is not quantised."""
    stored, checkpoint = packed.stored_names(), packed.checkpoint
    for name, entry in checkpoint.entries.items():
        if name not in stored and entry.dtype.is_floating_point:
            yield _digest(checkpoint.read(name).float())


def _digest(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
