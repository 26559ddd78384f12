"""`sqft doctor` says what is here, and its self-test fails where a stage fails or a proof does not hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sqft import cli, doctor, pipeline
from sqft.disk import write_json


def test_it_says_what_is_here_and_runs_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_bytes"] > found["memory_available_bytes"] > 0
    assert found["versions"]["torch"]
    assert found["stages"].keys() == {"sparsify", "quantize", "finetune", "search", "merge", "verify", "evaluate"}
    assert found["self_test"]["passed"]
    assert {"zeros_kept", "codes_equal", "logits_equal"} <= found["self_test"]["checks"].keys()


def test_what_it_finds_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.examine()
    assert dict(doctor.lines(found))["GPU"].startswith("none: ")
    found["gpus"] = [{"name": "Card", "memory_bytes": 80e9, "bfloat16": False}]
    found["stages"] |= {"finetune": "cuda:0"}
    told = dict(doctor.lines(found))
    assert told["GPU 0"] == "Card, 80.0 GB, bfloat16 NO"
    assert "cuda:0: finetune" in told["stages"]


def test_a_stage_that_fails_fails_the_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(pipeline, "run", broken)
    assert cli.run(["doctor"]) == 1
    assert "FAILED: RuntimeError: no kernel image is available" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checks", "said"), [({"codes_equal": False}, "FAILED: codes_equal"), ({}, "FAILED: verify checked nothing")]
)
def test_a_proof_that_does_not_hold_fails_the_test(
    checks: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def proved(recipe: Any, out: Any, announce: Any) -> None:
        out.mkdir()
        write_json(out / "verify.json", {"checks": [{"name": n, "passed": p} for n, p in checks.items()]})

    monkeypatch.setattr(pipeline, "run", proved)
    assert cli.run(["doctor"]) == 1
    assert said in capsys.readouterr().out
