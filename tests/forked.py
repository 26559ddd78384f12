"""Processes that begin with all imports done: a server imports once and forks them. A start of Python takes 16 seconds.

They find each other as those of `torchrun` do. What must begin afresh, the order of imports or `torchrun` itself, is
tested with real ones.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "sqft.cli",
        "sqft.pipeline",
        "sqft.stages.finetune",
        "sqft.stages.merge",
        "sqft.evaluation.lm_model",
        "trl.data_utils",
    ]
)


def run(
    arguments: list[str], processes: int = 1, script: Path | None = None, *, stop_others: bool = True
) -> CompletedProcess[str]:
    """Run `sqft ARGUMENTS`, or a script, in a group of processes; their outputs follow each other.

    `stop_others`, as `torchrun` does, when one has failed; else they must notice themselves.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as place:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": probe.getsockname()[1]}
        # No GPU may be used: a machine may have fewer than the processes.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        probe.close()
        started = []
        for rank in range(processes):
            shared = {**group, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            own = environment | {name: str(value) for name, value in shared.items()}
            given = (arguments, script, own, os.getcwd(), f"{place}/{rank}")
            started.append(_SERVER.Process(target=_work, args=given))
            started[-1].start()
        running = {process.sentinel: process for process in started}
        while running:
            for sentinel in wait(list(running)):
                if running.pop(sentinel).exitcode and stop_others:
                    for process in running.values():
                        process.terminate()
        texts = [
            "".join(Path(f"{place}/{rank}.{stream}").read_text() for rank in range(processes))
            for stream in ("out", "err")
        ]
    code = next((process.exitcode for process in started if process.exitcode), 0)
    return CompletedProcess(arguments, code or 0, *texts)


class Context:
    """Stands in for a context of multiprocessing that starts processes afresh."""

    Pipe = staticmethod(_SERVER.Pipe)

    @staticmethod
    def Process(target: Callable[..., Any], args: tuple[Any, ...]) -> BaseProcess:
        """Return a process with this one's environment and folder."""
        return _SERVER.Process(target=_as_here, args=(dict(os.environ), os.getcwd(), target, args))


def _as_here(environment: dict[str, str], folder: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    target(*arguments)


def _work(arguments: list[str], script: Path | None, environment: dict[str, str], folder: str, output: str) -> None:
    """Be one of the processes."""
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if script is not None:
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        return
    from sqft import cli

    sys.exit(cli.run(arguments))
