"""What an archive saves, beside zstd; how fast it is made and opened, beside `cp`; and evaluating it, beside the model.

    python benchmarks/archive.py FOLDER... [--sizes] [--speed] [--evaluate TASK] [--out benchmarks/results/archive.json]

Sizes are of all safetensors files of a folder. Times are seconds of the processor on one thread, files in the page
cache: medians of alternating rounds of `cp`, packing, unpacking, and opening with all checks. Packing and unpacking
are timed without SHA-256 and with it. A model of 135 M weights has a thousand small tensors, each with a cost of its
own, so matrices of a large one are timed too. What is not measured anew stays in the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import sqft
from common import RESULTS, machine
from sqft import digests
from sqft.stages import pack as stage
from sqft.stages.pack import _files, _Packer, pack, unpack
from sqft.storage.archive import ArchiveFile, place, unpack_file
from sqft.storage.checkpoint import Checkpoint

SHAPE = (14336, 4096)


def size(folder: Path, pattern: str = "*.safetensors") -> int:
    """Return the bytes of a folder's files of that name."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def zstd(folder: Path, level: int) -> int:
    """Return the bytes of a folder's safetensors files after zstd."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        command = ["zstd", f"-{level}", "-c", "-q", str(path)]
        total += len(subprocess.run(command, capture_output=True, check=True).stdout)
    return total


def seconds(work: Callable[[], object]) -> float:
    """Return how many seconds of the processor work takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def sizes(folder: Path, levels: list[int]) -> dict[str, object]:
    """Return the bytes of one folder in each form."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        archive = pack(folder, Path(name) / "archive").path
        before, after = size(folder), size(archive)
        return {
            "bytes": before,
            "packed_bytes": after,
            "ratio": before / after,
            **{f"zstd_{level}_bytes": zstd(folder, level) for level in levels},
            "packed_and_zstd_3_bytes": zstd(archive, 3),
        }


def speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Return seconds and the share of `cp`'s speed of each action on one folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place_ = Path(name)
        archive = pack(folder, place_ / "archive").path
        files = [file for file in _files(folder) if file.suffix == ".safetensors"]
        packed = [place(archive / file) for file in files]

        def copied() -> None:
            for file in files:
                shutil.copyfile(folder / file, place_ / "copy")

        def made() -> None:
            with unittest.mock.patch.object(stage, "digest_file", lambda _: "0" * 64):
                packer = _Packer(folder)
                shutil.rmtree(place_ / "one", ignore_errors=True)
                (place_ / "one" / "made").mkdir(parents=True)
                for file in files:
                    packer.pack(file, place_ / "one", place_ / "one" / "made" / file.name, lambda _: None)

        def unpacked() -> None:
            for file in packed:
                unpack_file(ArchiveFile(file), place_ / "back", Checkpoint(archive))

        def whole(work: Callable[[Path, Path], object], source: Path) -> None:
            digests._known.clear()
            work(source, place_ / "whole")

        actions = {
            "cp": copied,
            "pack": made,
            "unpack": unpacked,
            "open": lambda: [ArchiveFile(file) for file in packed],
            "pack, SHA-256": lambda: whole(pack, folder),
            "unpack, SHA-256": lambda: whole(unpack, archive),
        }
        times: dict[str, list[float]] = {action: [] for action in actions}
        for _ in range(rounds):
            for action, work in actions.items():
                times[action].append(seconds(work))
                shutil.rmtree(place_ / "whole", ignore_errors=True)
        medians = {action: statistics.median(values) for action, values in times.items()}
        count = sum(len(Checkpoint(folder, [str(file)]).entries) for file in files)
        return {"bytes": size(folder), "tensors": count, "rounds": rounds, "seconds": medians}


def large(form: str, place: Path, count: int = 4) -> Path:
    """Write a folder of matrices of a model of 8 B, at 50 % zeros, in BF16 or in INT4 with groups of 64."""
    generator = torch.Generator().manual_seed(0)
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 1}
    tensors: dict[str, torch.Tensor] = {}
    rows, columns = SHAPE
    for i in range(count):
        kept = torch.rand(SHAPE, generator=generator) < 0.5
        if form == "BF16":
            tensors[f"{i}.weight"] = torch.randn(SHAPE, generator=generator).bfloat16() * kept
            continue
        codes = torch.randint(0, 16, SHAPE, generator=generator, dtype=torch.uint8)
        codes = torch.where(kept, codes, torch.full_like(codes, 7))
        zeros = torch.full((rows // 8, columns // 64), 0x77777777, dtype=torch.int32)
        tensors |= {
            f"{i}.weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int32),
            f"{i}.weight_scale": torch.ones(rows, columns // 64, dtype=torch.bfloat16),
            f"{i}.weight_zero_point": zeros,
            f"{i}.weight_shape": torch.tensor(SHAPE),
        }
    if form == "INT4":
        weights = {"num_bits": 4, "group_size": 64, "strategy": "group", "symmetric": False, "type": "int"}
        groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": groups,
        }
    place.mkdir(parents=True)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    return place


def evaluated(folder: Path, task: str, limit: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of evaluating a folder and its archive, in turn."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        archive = pack(folder, Path(name) / "archive").path
        times: dict[str, list[float]] = {"folder": [], "archive": []}
        for i in range(rounds):
            for form, place_ in (("folder", folder), ("archive", archive)):
                out = Path(name) / f"{form}{i}.json"
                times[form].append(seconds(lambda: sqft.evaluate(place_, data=task, limit=limit, out=out)))  # noqa: B023
        medians = {form: statistics.median(values) for form, values in times.items()}
        return {"task": task, "rows": limit, "rounds": rounds, "seconds": medians}


def main() -> None:
    """Measure the folders given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--speed", action="store_true", help="also of matrices of a large model")
    parser.add_argument("--evaluate", help="a task")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", type=int, default=[3], help="zstd's (19 takes minutes a file)")
    parser.add_argument("--out", type=Path, default=RESULTS / "archive.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    result |= machine()
    for folder in options.folders:
        if options.sizes:
            result.setdefault("folders", {})[folder.name] = sizes(folder, options.levels)
        if options.speed:
            result.setdefault("speed", {})[folder.name] = speed(folder, options.rounds)
        if options.evaluate:
            found = evaluated(folder, options.evaluate, options.rows, options.rounds)
            result.setdefault("evaluate", {})[folder.name] = found
    if options.speed:
        for form in ("BF16", "INT4"):
            with tempfile.TemporaryDirectory(dir=options.folders[0].parent if options.folders else None) as name:
                found = speed(large(form, Path(name) / "large"), options.rounds)
            result.setdefault("speed", {})[f"{' × '.join(map(str, SHAPE))}, {form}"] = found
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
