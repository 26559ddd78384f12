"""Several processes compress one model: to rounding the weights that one makes, and nothing half-written."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compressing
import forked
from sqft import processes
from sqft.artifact import Artifact
from sqft.storage.masks import MASK_FILE, START_FILE

SCRIPT = Path(compressing.__file__)
UNMASKED = {"llama-gptq", "llama-rtn", "llama-symmetric"}


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> list[str]:
    return [str(tiny_model(name, "float32")) for name in ("llama", "gpt2", "mixtral")]


def make(out: Path, models: list[str], count: int, *cases: str) -> Path:
    out.mkdir()
    done = forked.run([str(out), *models, *cases], count, SCRIPT)
    assert done.returncode == 0, done.stderr
    return out


def compare(one: Path, many: Path) -> None:
    """Compare a folder that one process made with one that several did."""
    assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(many) for p in many.rglob("*")}
    masks = [load_file(folder / MASK_FILE) for folder in (one, many) if (folder / MASK_FILE).exists()]
    assert len(masks) == (0 if one.name in UNMASKED else 2)
    for name in masks[0] if masks else ():
        assert torch.equal(masks[0][name], masks[1][name]), (one.name, name)
    weights = [load_file(folder / "model.safetensors") for folder in (one, many)]
    for name, value in weights[0].items():
        if value.is_floating_point():
            assert torch.allclose(value, weights[1][name], atol=1e-4), (one.name, name)
        else:
            assert torch.equal(value, weights[1][name]), (one.name, name)
    if (one / START_FILE).exists():
        starts = [load_file(folder / START_FILE) for folder in (one, many)]
        for name, value in starts[0].items():
            assert (value.int() - starts[1][name].int()).abs().max() <= 1, (one.name, name)


def compare_manifests(one: Path, two: Path) -> None:
    """The manifest says how many shared the work; the key does not, so that one goes on with what several began."""
    found, other = (Artifact.open(folder).manifest for folder in (one, two))
    assert found["key"] == other["key"]
    assert "processes" not in found["result"]
    assert other["result"].pop("processes") == 2
    for layer, shared in zip(found["result"].pop("layers"), other["result"].pop("layers"), strict=True):
        assert layer.pop("relative_error") == pytest.approx(shared.pop("relative_error"), rel=1e-3)
        assert layer == shared
    assert found["result"] == other["result"]


def check_shares(records: list[dict[str, Any]]) -> None:
    """Each of two processes held one block, ran its own samples, and used what both had seen."""
    assert records[0]["held"] == records[1]["held"]
    assert all(len(blocks) == 1 for blocks in records[0]["held"])
    length = compressing.TOKENS.shape[1]
    assert [set(record["seen"][0]) for record in records] == [{2 * length}, {3 * length}]
    assert records[0]["summed"] == records[1]["summed"]
    # A linear is rounded by one of them.
    assert set(records[0]["rounded"]).isdisjoint(records[1]["rounded"])
    assert len(records[0]["rounded"]) + len(records[1]["rounded"]) == 2 * 4 * len(compressing.QUANTISED)
    # Of the experts, some had tokens of one process alone.
    seen = [[*chain(*record["seen"][-2:])] for record in records]
    assert any(a and not b for a, b in zip(*seen, strict=True))
    assert any(b and not a for a, b in zip(*seen, strict=True))
    assert [a + b for a, b in zip(*seen, strict=True)] == [*chain(*records[0]["summed"][-2:])]


def test_it_is_the_model_of_one_process(models: list[str], tmp_path: Path) -> None:
    one, two = (make(tmp_path / str(count), models, count) for count in (1, 2))
    for case in compressing.CASES:
        compare(one / case, two / case)
    compare_manifests(one / "llama-joint", two / "llama-joint")
    check_shares([json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)])
    three = make(tmp_path / "3", models, 3, "llama-joint-sparsegpt", "mixtral-few")
    for case in ("llama-joint-sparsegpt", "mixtral-few"):
        compare(one / case, three / case)


@pytest.fixture
def command(models: list[str], tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    settings = ["--calibration.data", str(text), "--calibration.samples", "4", "--calibration.length", "32"]
    return ["quantize", models[0], str(tmp_path / "out" / "made"), "--group-size", "16", *settings]


@pytest.mark.parametrize(
    ("how", "said"),
    [("--fail", "process 1: error: made to fail\n"), ("--kill", "error: one of the 2 processes has ended")],
)
def test_one_that_ends_ends_all_with_one_message(command: list[str], tmp_path: Path, how: str, said: str) -> None:
    done = forked.run([how, *command], 2, SCRIPT, stop_others=False)
    assert done.returncode != 0
    assert done.stderr.startswith(said)
    assert done.stderr.count("error:") == 1, done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    # The same command goes on, with whatever number of processes.
    again = forked.run(command, 1)
    assert again.returncode == 0, again.stderr
    assert Artifact.open(command[2]).check()


def test_a_command_that_cannot_be_done_says_so_once(command: list[str]) -> None:
    wrong = forked.run([*command, "--group-size", "7"], 2, stop_others=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count("error: quantize:") == wrong.stderr.count("error:") == 1, wrong.stderr
    few = forked.run([*command, "--calibration.samples", "1"], 2, stop_others=False)
    assert few.returncode == 2
    assert few.stderr.count("calibration has 1 samples, which 2 processes cannot share") == 1, few.stderr


def test_work_is_dealt_by_its_length() -> None:
    assert processes.deal([2.6, 2.4, 3.8, 7.9], 2) == [1, 1, 1, 0]
    assert processes.deal([1.0] * 3, 3) == [0, 1, 2]  # each has the one of its own number
    assert processes.deal([1.0], 3) == [0]
