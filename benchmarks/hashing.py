"""What a proof's hashing costs: seconds a gigabyte of SHA-256 through `sqft`, beside reading the same file alone.

    python benchmarks/hashing.py [--gigabytes 1] [--rounds 7] [--at FOLDER]

One file of random bytes, written anew, in rounds that alternate. The file is in the system's cache, and the seconds are
those that the processor worked for this process, which other work on the machine does not count in. A disk that reads
more slowly than that decides alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import ratio, save
from sqft.digests import digest_file

BUFFER = 1 << 18  # bytes; that of hashlib.file_digest


def read(file: Path) -> None:
    """Read a file into one buffer, as hashing does."""
    buffer = bytearray(BUFFER)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def digest(file: Path) -> None:
    """Hash a file whose digest this process may know already: a new time makes it another file."""
    os.utime(file)
    digest_file(file)


def worked(action: Callable[[], None]) -> float:
    """Return the processor's seconds of a call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--at", type=Path, help="folder of the file (default: the system's for temporary files)")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"hashing": [], "reading": []}
    with tempfile.TemporaryDirectory(dir=options.at) as temporary:
        file = Path(temporary) / "random.bin"
        with open(file, "wb") as stream:
            for _ in range(options.gigabytes * 1000):
                stream.write(os.urandom(1_000_000))
        actions = {"hashing": partial(digest, file), "reading": partial(read, file)}
        actions["reading"]()  # the file is in the cache from here on
        for _ in range(options.rounds):
            for name, action in actions.items():
                seconds[name].append(worked(action) / options.gigabytes)
    result = {
        "gigabytes": options.gigabytes,
        "rounds": options.rounds,
        "seconds_per_gb": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "fastest_and_slowest": {name: [round(min(v), 2), round(max(v), 2)] for name, v in seconds.items()},
        "hashing_to_reading": round(ratio(seconds, "hashing", "reading"), 2),
        "sha_instructions": "sha_ni" in Path("/proc/cpuinfo").read_text(),
    }
    print(result)
    save("hashing", result)


if __name__ == "__main__":
    main()
