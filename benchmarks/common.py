"""What the benchmarks share: alternating timing, peak memory of one call, and results as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    else:
        with suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            facts["device"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
            facts["amx_bf16"] = any("amx_bf16" in line for line in lines if line.startswith("flags"))
    return facts


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(actions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time the actions in turn, round by round, so that a drifting machine touches all alike; seconds."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        for name, action in actions.items():
            synchronise()
            start = time.perf_counter()
            action()
            synchronise()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median over rounds of one / other."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def _status(field: str) -> int:
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(field))


def peak_memory(action: Callable[[], Any]) -> int:
    """Return by how many bytes a call raises memory at its highest: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS:")
    action()
    return _status("VmHWM:") - before


def save(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, "machine": machine()}, indent=2) + "\n")
    print(f"written: {path}")
