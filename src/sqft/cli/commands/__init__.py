"""What each command does with its options; each returns its exit code."""

from sqft.cli.commands.making import (
    export,
    extract,
    finetune,
    merge,
    pack,
    quantize,
    run,
    search,
    sparsify,
    unpack,
)
from sqft.cli.commands.showing import chat, compare, doctor, evaluate, inspect, plan, sweep, verify

__all__ = [
    "chat",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "extract",
    "finetune",
    "inspect",
    "merge",
    "pack",
    "plan",
    "quantize",
    "run",
    "search",
    "sparsify",
    "sweep",
    "unpack",
    "verify",
]
