"""What a second process brings to compressing: one process of one thread, and two that share samples and linears.

    python benchmarks/processes.py MODEL_FOLDER [--samples 64] [--length 128] [--rounds 3] [--sparsity 0.5]

The command `sqft quantize` itself; one process and two alternate. Of each: the seconds of the whole command, those of
the work alone (as the manifest has them: without imports, hashing the model and drawing the text), and the processor's
seconds of the slowest process. The last say what idle cores would give where others use them too; the load that the
system had before each round, in processes that wanted to run, is in the result. Then how many codes differ, and how
many differ where one process runs another number of sequences at a time, which rounds as differently.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common import save


def compress(out: Path, options: argparse.Namespace, processes: int, batch: int = 8) -> dict[str, float]:
    """Return the seconds of one command: whole, the work alone, and the processor's of the slowest process."""
    command = [sys.executable, "-m", "sqft", "quantize", str(options.model), str(out), "--threads", "1"]
    command += ["--device", "cpu", "--calibration.data", "wikitext2", "--calibration.batch", str(batch)]
    command += ["--calibration.samples", str(options.samples), "--calibration.length", str(options.length)]
    command += [] if options.sparsity is None else ["--sparsity", str(options.sparsity)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun starts them, without the processor's time of its own.
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start, running = time.perf_counter(), []
    for rank in range(processes):
        place = {**group, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in place.items()}}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    used = []
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"sqft quantize ended with {process.returncode}")
        used.append(usage.ru_utime + usage.ru_stime)
    whole = time.perf_counter() - start
    work = json.loads((out / "sqft" / "manifest.json").read_text())["seconds"]
    return {"command": whole, "work": work, "processor": max(used)}


def differing(one: Path, other: Path) -> float:
    """Return the share of 4-bit codes that two quantised folders have differently."""
    packed = [
        {name: value for name, value in load_file(folder / "model.safetensors").items() if name.endswith("packed")}
        for folder in (one, other)
    ]
    changed = total = 0
    for name, value in packed[0].items():
        both = value ^ packed[1][name]
        changed += sum(int((both >> shift & 15).count_nonzero()) for shift in range(0, 32, 4))
        total += 8 * value.numel()
    return changed / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, help="also prune, in the same pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for number in range(options.rounds):
            found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
            for processes in (1, 2):
                seconds = compress(place / f"{processes}-{number}", options, processes)
                found[str(processes)] = {name: round(value, 1) for name, value in seconds.items()}
            rounds.append(found)
            print(found, flush=True)
        compress(place / "otherwise", options, 1, batch=5)
        changed = {
            "two_processes": differing(place / "1-0", place / "2-0"),
            "one_process_other_batch": differing(place / "1-0", place / "otherwise"),
        }
    speed_up = {
        kind: round(statistics.median(one["1"][kind] / one["2"][kind] for one in rounds), 2)
        for kind in ("command", "work", "processor")
    }
    settings = {name: getattr(options, name) for name in ("samples", "length", "sparsity")}
    result = {**settings, "rounds": rounds, "speed_up": speed_up, "codes_changed": changed}
    print(speed_up, changed)
    save("processes", result)


if __name__ == "__main__":
    main()
