"""What all stages do alike: settings, check, work.

A stage says what its result depends on (settings, inputs, seed). A result that was made with the same is returned as it
is; one that was made with other settings raises. Otherwise the stage checks all that can be checked cheaply, and then
works in a folder that appears whole or not at all, or writes a JSON file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqft import processes
from sqft.artifact import (
    DESCRIBED,
    Artifact,
    Draft,
    as_record,
    describe,
    partial_of,
    refuse_foreign,
    reuse,
    writing,
)
from sqft.disk import read_json, write_json
from sqft.errors import InputError
from sqft.locks import exclusive
from sqft.versions import versions

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One result: where it is, and what it depends on.

    Attributes:
        out: the folder or JSON file to make.
        description: from :func:`sqft.artifact.describe`; its hash is the key under which the stage is skipped.
    """

    out: Path
    description: dict[str, Any]

    @classmethod
    def of(
        cls, name: str, out: Path, settings: Mapping[str, Any], inputs: Mapping[str, str | Path], seed: int
    ) -> Stage:
        """Return a stage; the bytes of its inputs are hashed here.

        Raises:
            InputError: an input does not exist, or is a stage's folder that was changed.
        """
        return cls(out, describe(name, settings, inputs, seed))

    def make(
        self,
        check: Callable[[], T],
        work: Callable[[T, Draft], dict[str, Any]],
        *,
        in_turn: bool = False,
        shared: bool = False,
    ) -> Artifact:
        """Return the stage's folder, made if it is not there.

        Args:
            check: raises all that can be known before the work, and returns what the work needs.
            work: fills the folder of the draft, and returns the manifest's `result`.
            in_turn: several processes may have shared the check; the first one writes the folder for all.
            shared: all processes of a command check and work together; the first one alone writes.

        Raises:
            InputError: the folder was made with other settings, is being made, or the disk is full; and what `check`
                raises.
        """
        if done := reuse(self.out, self.description):
            return done
        if shared:
            processes.barrier()  # all have seen that it is still to be made
        ready = check()
        with exclusive(self.out) if in_turn else nullcontext():
            if in_turn and (done := reuse(self.out, self.description)):
                return done
            with (
                writing(self.out, self.description)
                if processes.first()
                else nullcontext(Draft(partial_of(self.out))) as draft
            ):
                draft.result = work(ready, draft)
        if shared:
            processes.barrier()
        return Artifact.open(self.out)

    def record(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the stage's JSON result, written if the file is not there.

        Raises:
            InputError: the file was made with other settings or from other bytes, or not by sqft.
        """
        done = reuse_result(self.out, self.description)
        return write_result(self.out, self.description, work()) if done is None else done


def reuse_result(path: Path, description: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a JSON result (verify.json, an evaluation) made with this description, None if it is still to be made.

    Raises:
        InputError: the file was made with other settings or from other bytes, or not by sqft.
    """
    if not path.is_file():
        return None
    try:
        value = read_json(path)
        made_from = as_record(value["made_from"], DESCRIBED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not written by sqft ({error!r}); move it away or choose another --out") from error
    refuse_foreign(path, made_from, description)
    return dict(value)


def write_result(path: Path, description: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON result with what it was made from; whole or not at all."""
    result = {**value, "versions": versions(), "made_from": dict(description)}
    write_json(path, result)
    return result
