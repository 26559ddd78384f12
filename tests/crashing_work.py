"""What test_crashes.py kills: run by a process of its own, which forks for every kill.

crashing_work.py WORK ROOT [STRIDE]: prints {"kills": how many}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from crashes import Work, kill_everywhere

from sqft.artifact import describe, finished, finished_result, write_result, writing


def _source(folder: Path) -> dict[str, Path]:
    return {"model": folder.parent.parent / "source"}


def stage(folder: Path) -> None:
    """A stage that begins anew after a kill."""
    description = describe("stage", {"a": 1}, _source(folder), 0)
    if finished(folder / "made", description):
        return
    with writing(folder / "made", description) as draft:
        for name in ("one.safetensors", "two.safetensors"):
            (draft.path / name).write_bytes(name.encode())
        draft.result = {"found": 2}


def resumed_stage(folder: Path) -> None:
    """A stage that goes on from its checkpoints."""
    description = describe("stage", {"a": 1}, _source(folder), 0)
    if finished(folder / "made", description):
        return
    with writing(folder / "made", description) as draft:
        draft.checkpoints.mkdir(exist_ok=True)
        for step in range(3):
            done = draft.checkpoints / f"{step}.done"
            if not done.exists():
                (draft.checkpoints / f"{step}.part").write_bytes(b"step")
                os.rename(draft.checkpoints / f"{step}.part", done)
        (draft.path / "one.safetensors").write_bytes(b"".join(p.read_bytes() for p in draft.checkpoints.glob("*.done")))
        (draft.path / "sqft" / "log.txt").write_text("log")


def result(folder: Path) -> None:
    """A JSON result beside an earlier one."""
    description = describe("verify", {}, _source(folder), 0)
    for name in ("one.json", "two.json"):
        if finished_result(folder / name, description) is None:
            write_result(folder / name, description, {"passed": True})
        assert json.loads((folder / name).read_text())["passed"]


def damaged_order(folder: Path) -> None:
    """Work that takes a file for whole because it is there: what kill_everywhere must find."""
    if not (folder / "made.bin").exists():
        (folder / "made.bin").write_bytes(b"content")


WORKS: dict[str, Work] = {work.__name__: work for work in (stage, resumed_stage, result, damaged_order)}


def main(arguments: list[str]) -> None:
    """Kill one work everywhere."""
    name, root, *more = arguments
    places = Path(root)
    (places / "source").mkdir()
    (places / "source" / "weights").write_bytes(b"12345")
    (places / "kills").mkdir()
    print(json.dumps({"kills": kill_everywhere(WORKS[name], places / "kills", every=int(more[0]) if more else 1)}))
