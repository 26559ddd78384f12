"""What an archive saves, beside zstd, and how fast it is made, beside `cp`.

    python benchmarks/archive.py FOLDER... [--out benchmarks/results/archive.json]

Sizes are of all safetensors files of a folder. Times are medians of alternating repetitions on one thread, of packing
and unpacking without hashing; hashing has a benchmark of its own (hashing.py). `--repetitions 0` measures sizes alone,
for a busy machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import machine
from sqft.stages.pack import _files, _Packer, pack
from sqft.storage.archive import open_archive, place, unpack_file
from sqft.storage.checkpoint import Checkpoint


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
    """Return how long work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, repetitions: int, levels: list[int]) -> dict[str, object]:
    """Return sizes and times of one folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name)
        archive = pack(folder, temporary / "archive").path
        files = [file for file in _files(folder) if file.suffix == ".safetensors"]
        times: dict[str, list[float]] = {"cp": [], "pack": [], "unpack": []}

        def unpacked() -> None:
            for file in files:
                unpack_file(open_archive(place(archive / file)), temporary / "back", Checkpoint(archive))

        def packed() -> None:
            packer = _Packer(folder)
            shutil.rmtree(temporary / "one", ignore_errors=True)
            (temporary / "one" / "made").mkdir(parents=True)
            for file in files:
                packer.pack(file, temporary / "one", temporary / "one" / "made" / file.name, lambda _: None)

        for _ in range(repetitions):
            times["cp"].append(seconds(lambda: [shutil.copyfile(folder / f, temporary / "copy") for f in files]))
            times["pack"].append(seconds(packed))
            times["unpack"].append(seconds(unpacked))
        before, after = size(folder), size(archive)
        print(f"{folder.name}: {before / 1e6:.1f} MB, packed {after / 1e6:.1f} MB, {before / after:.2f} times smaller")
        return {
            "bytes": before,
            "packed_bytes": after,
            "ratio": before / after,
            **{f"zstd_{level}_bytes": zstd(folder, level) for level in levels},
            "packed_and_zstd_3_bytes": zstd(archive, 3),
            "median_seconds": {name: statistics.median(values) for name, values in times.items() if values},
        }


def main() -> None:
    """Measure the folders given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--levels", nargs="+", type=int, default=[3], help="zstd's (19 takes minutes a file)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        **machine(),
        "folders": {folder.name: measure(folder, options.repetitions, options.levels) for folder in options.folders},
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
