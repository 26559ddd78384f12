"""What the benchmarks share: alternating timing, peak memory of one call, and results as JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# The adapters that the committed results were measured with.
ADAPTERS: dict[str, Any] = {
    "ranks": [32],
    "lora_alpha": 64,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
}


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


def alternate(actions: dict[str, Callable[[], Any]], rounds: int, least: float = 0.15) -> dict[str, list[float]]:
    """Time the actions in turn, round by round, so that a drifting machine touches all alike.

    Returns:
        Seconds per call; a sample repeats a short action until it lasts `least` seconds.
    """
    repeats: dict[str, int] = {}
    for name, action in actions.items():
        action()
        synchronise()
        start = time.perf_counter()
        action()
        synchronise()
        repeats[name] = max(1, math.ceil(least / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                action()
            synchronise()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median over rounds of one / other."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def peak_memory(action: Callable[[], Any]) -> int:
    """Return by how many bytes a call raises the memory that torch has allocated, at its highest.

    On a CPU the profiler's allocation events are added up: resident memory would show the allocator's reuse instead.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    results = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    running = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        highest = max(highest, running)
    return highest


def save(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, "machine": machine()}, indent=2) + "\n")
    print(f"written: {path}")
