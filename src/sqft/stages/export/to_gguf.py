"""Write a quantised model as a GGUF file that holds every weight exactly, and prove it.

llama.cpp has no converter that keeps somebody else's 4-bit grid: it dequantises and rounds anew. Here the codes are
written as blocks (:mod:`sqft.core.blocks`), llama.cpp's converter does all else (names, vocabulary, metadata), and the
file is read back and compared (:mod:`sqft.storage.gguf`) before it gets its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sqft.artifact import partial_of
from sqft.core.blocks import BLOCK, TYPES, encode, exact_types
from sqft.disk import check_space, discard, read_json, sync
from sqft.errors import InputError, Problems
from sqft.locks import making
from sqft.progress import progress
from sqft.stages.export.checks import quantized_config
from sqft.stages.export.converter import Converter, given, install
from sqft.storage.checkpoint import plain_files, side_files
from sqft.storage.gguf import prove
from sqft.storage.integers import PackedCheckpoint
from sqft.storage.tokenizer import mend_byte_fallback, splits_as_gpt2

logger = logging.getLogger(__name__)

_FLOAT = (
    "llama.cpp's own converter writes it without loss (convert_hf_to_gguf.py MODEL --outtype auto), or quantise it "
    "first: sqft quantize MODEL QUANTIZED"
)
_OUTTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


class _Ready(NamedTuple):
    """What the check found: the weights, the smallest type that holds them all, and the converter."""

    packed: PackedCheckpoint
    kind: str
    converter: Converter


def run(model: Path, out: Path, place: Path | None = None) -> dict[str, Any]:
    """Write a model folder's GGUF file.

    Args:
        model: folder of a quantised model.
        out: the file to make.
        place: llama.cpp's converter, as a folder or an interpreter; None is the pinned one.

    Returns:
        The proof, as :func:`sqft.storage.gguf.prove` returns it.

    Raises:
        InputError: the model cannot be exported (every reason), or the converter failed, or the proof did; there is
            then no file.
    """
    ready = _check(model, out, place)
    with making(out):
        work = partial_of(out)
        discard(work)
        work.mkdir()
        try:
            file = work / out.name
            job = {"model": str(work / model.name), "out": str(file), **_write_blocks(ready, work / "blocks")}
            job["cuts"] = "gpt-2" if splits_as_gpt2(model) else None
            (work / "job.json").write_text(json.dumps(job))
            with plain_files(model) as plain:
                _lay_out(model, plain, work / model.name)
                logger.info("llama.cpp's converter writes %s", out.name)
                ready.converter.convert(work / "job.json")
            logger.info("comparing every weight of the file with the model's")
            proof = prove(file, ready.packed)
            sync(file)
            os.link(file, out)  # refused where the name was taken meanwhile
        finally:
            discard(work)
    return proof


def _check(model: Path, out: Path, place: Path | None) -> _Ready:
    """Return what the work needs.

    Raises:
        InputError: every problem that can be known before it.
    """
    if not model.is_dir():
        raise InputError(f"model {model}: no such folder")
    packed, kind, converter = None, None, None
    with Problems(f"export of {model}") as problems:
        if out.suffix != ".gguf":
            problems.add(f"{out} does not end in .gguf; for a folder of OpenVINO give --format openvino")
        if out.exists():
            problems.add(f"{out} already exists; delete it or choose another name")
        converter = problems.attempt(lambda: given(place))
        config = problems.attempt(lambda: quantized_config(model, _FLOAT))
        if config is not None:
            packed = problems.attempt(lambda: PackedCheckpoint(model))
            kind = None if packed is None else problems.attempt(lambda: _smallest(packed))
            # The pinned converter is installed only for what is otherwise in order.
            if converter is None and place is None and not list(problems):
                converter = install()
            if converter is not None:
                _check_architecture(config, converter, problems)
    if packed is None or kind is None or converter is None:
        raise AssertionError("a check failed and said nothing")
    linears = sum(rows * columns for rows, columns in packed.shapes.values()) * TYPES[kind].bits / 8
    check_space(
        out.parent, int(2 * linears + packed.checkpoint.size_bytes), "the GGUF file, with its blocks beside it,"
    )
    return _Ready(packed, kind, converter)


def _smallest(packed: PackedCheckpoint) -> str:
    """Return the smallest type that holds every linear.

    Raises:
        InputError: none does; of each kind of reason the first linear that has it.
    """
    kinds, refused = set(TYPES), []
    for name in packed.shapes:
        try:
            kinds &= set(exact_types(*packed.read(name)))
        except InputError as error:
            refused.append(f"{name}: {error}")
    if refused:
        raise InputError(f"{len(refused)} of its {len(packed.shapes)} linears fit no GGUF file; {refused[0]}")
    return next(name for name in TYPES if name in kinds)


def _check_architecture(config: dict[str, Any], converter: Converter, problems: Problems) -> None:
    named = config.get("architectures")
    known = problems.attempt(converter.architectures)
    if known is not None and (not isinstance(named, list) or not named or named[0] not in known):
        problems.add(
            f"its config.json has the architectures {named}, which llama.cpp's converter does not know; it knows "
            f"{len(known)}, such as LlamaForCausalLM; a newer one can be given with --converter"
        )


def _write_blocks(ready: _Ready, file: Path) -> dict[str, Any]:
    """Write the blocks of all linears behind each other; return where each begins."""
    packed, first, weights = ready.packed, 0, []
    with open(file, "wb") as stream, progress(len(packed.shapes), "encoding", "linear") as advance:
        for name, shape in packed.shapes.items():
            prefix = name.removesuffix(".weight")
            stored = [f"{prefix}.{suffix}" for suffix in packed.scheme.suffixes]
            weights.append({"name": name, "shape": shape, "first": first, "stored": stored})
            stream.write(encode(*packed.read(name), ready.kind).numpy().data)
            first += shape[0] * shape[1] // BLOCK
            advance(1)
    outtype = _OUTTYPES[packed.checkpoint.dtype]
    return {"type": ready.kind, "blocks": str(file), "weights": weights, "outtype": outtype}


def _lay_out(model: Path, plain: Path, folder: Path) -> None:
    """Make the folder that the converter reads: the model without a word of its quantisation.

    Args:
        model: the model's folder.
        plain: its plain files, the same folder where it is no archive.
        folder: to make, with the model's name, which becomes the file's title.
    """
    folder.mkdir()
    for path in [*side_files(model), *model.glob("*.md")]:
        place = folder / path.relative_to(model)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    for path in [*plain.glob("*.safetensors"), *plain.glob("*.safetensors.index.json")]:
        (folder / path.name).symlink_to(path.absolute())
    config = read_json(model / "config.json")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    if mend_byte_fallback(folder):
        logger.info("tokenizer.json says byte_fallback, of a vocabulary without bytes; the file is made without it")
