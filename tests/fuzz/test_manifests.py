"""Damaged manifests and descriptions: finished, unfinished and used work, and results in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.damage import copied, edited, json_bytes, nested, outcome, put, share
from sqft.artifact import (
    CHECKPOINTS,
    DESCRIPTION,
    MANIFEST,
    Artifact,
    describe,
    digest_input,
    partial_of,
    reuse,
    writing,
)
from sqft.errors import InputError
from sqft.stage import reuse_result, write_result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished stage folder and what it was made from."""
    root = tmp_path_factory.mktemp("made")
    source = root / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"12345")
    description = describe("sparsify", {"sparsity": 0.5, "calibration": {"samples": 8}}, {"model": source}, seed=0)
    with writing(root / "sparse", description) as draft:
        (draft.path / "model.safetensors").write_bytes(b"made")
        draft.result = {"zeros": 3}
    return root / "sparse", description


@share(0.06)
@given(st.data())
def test_a_manifest_holds_or_is_refused(made: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    folder, description = made
    content = data.draw(json_bytes(edited(json.loads((folder / MANIFEST).read_text()))))
    with copied(folder) as place:
        put(place, str(MANIFEST), content)
        artifact = outcome(lambda: Artifact.open(place), place, leaves=place)
        if artifact is not None:
            assert isinstance(artifact.digest, str)
            outcome(artifact.check, place, leaves=place)
        outcome(lambda: digest_input(place), place, leaves=place)
        again = outcome(lambda: reuse(place, description), place)
        assert again is None or again.digest == Artifact.open(folder).digest


@share(0.04)
@given(st.data())
def test_unfinished_work_goes_on_or_is_refused(made: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    _, description = made
    content = data.draw(json_bytes(edited(description)))
    with copied() as place:
        folder = place / "sparse"
        put(partial_of(folder), str(DESCRIPTION), content)
        put(partial_of(folder), f"{CHECKPOINTS}/1/state", b"")
        assert outcome(lambda: reuse(folder, description), place, leaves=place) is None


@share(0.04)
@given(st.data())
def test_a_result_counts_or_is_refused(made: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    _, description = made
    with copied() as place:
        file = place / "verify.json"
        written = write_result(file, description, {"passed": True, "checks": []})
        put(place, "verify.json", data.draw(json_bytes(edited(written))))
        found = outcome(lambda: reuse_result(file, description), file, leaves=place)
        assert found is None or isinstance(found, dict)


@pytest.mark.parametrize("depth", [300, 3000])
def test_records_that_are_nested_too_deeply_are_refused(made: tuple[Path, dict[str, Any]], depth: int) -> None:
    folder, description = made
    with copied(folder) as place:
        put(place, str(MANIFEST), nested("{}", depth).encode())
        with pytest.raises(InputError, match=re.escape(str(place))):
            Artifact.open(place)
        unfinished = put(partial_of(place / "other"), str(DESCRIPTION), nested("{}", depth).encode())
        put(unfinished.parent.parent, f"{CHECKPOINTS}/1/state", b"")
        with pytest.raises(InputError, match="unfinished work"):
            reuse(place / "other", description)
        with pytest.raises(InputError, match=re.escape(str(place))):
            reuse_result(put(place, "verify.json", nested("{}", depth).encode()), description)
