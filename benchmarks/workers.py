"""What a second process brings to a search: the same configurations by one process and by two that share the study.

    python benchmarks/workers.py BASE ADAPTER [--task mawps] [--rows 50] [--configurations 12] [--rounds 2]

The command `sqft search` itself, with one thread a process, random strategy, so that all configurations are known at
once; loading included. One process and two alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save


def search(base: Path, adapter: Path, out: Path, options: argparse.Namespace, processes: int) -> float:
    """Return the seconds until all processes of a search have ended."""
    command = [sys.executable, "-m", "sqft", "search", str(adapter), str(out), "--base", str(base), "--threads", "1"]
    command += ["--task", options.task, "--samples", str(options.rows), "--strategy", "random"]
    command += ["--turns", "1", "--neighbours", str(options.configurations - 1), "--batch", "32"]
    start = time.perf_counter()
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(processes)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"sqft search ended with {codes}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--task", default="mawps")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--configurations", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.rounds):
            for processes, taken in seconds.items():
                out = Path(temporary) / f"{processes}-{number}"
                taken.append(search(options.base, options.adapter, out, options, processes))
                records.append(json.loads((out / "sqft" / "search.json").read_text()))
                print(processes, round(taken[-1], 1), len(records[-1]["trials"]), flush=True)
    medians = {count: statistics.median(taken) for count, taken in seconds.items()}
    settings = {"task": options.task, "rows": options.rows, "configurations": len(records[0]["trials"])}
    save(
        "workers",
        {
            **settings,
            "rounds": options.rounds,
            "seconds": {str(count): round(value, 1) for count, value in medians.items()},
            "speed_up": round(medians[1] / medians[2], 2),
            "chosen_alike": all(record["chosen"]["ranks"] == records[0]["chosen"]["ranks"] for record in records),
        },
    )


if __name__ == "__main__":
    main()
