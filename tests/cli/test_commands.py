"""What a command refuses or prepares before its work, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft import cli, verbs
from sqft.cli.flags import given
from sqft.cli.parser import parser
from sqft.errors import InputError
from sqft.recipe import FinetuneConfig
from sqft.verbs.places import model_folder, result_file


def test_two_gguf_files_are_unpacked_into_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.model.sources._unpack_gguf", lambda file, folder: folder)
    first, again, other = (
        model_folder(str(tmp_path / name), tmp_path) for name in ("a/m.gguf", "a/m.gguf", "b/m.gguf")
    )
    assert first == again != other
    assert first.parent.name.startswith("m-")


def test_what_is_only_shown_names_no_other_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    places: list[Path] = []

    def stop(_out: Path | None, stage: str, arguments: Mapping[str, object], *inputs: Path) -> Path:
        places.append(result_file(None, stage, arguments, *inputs))
        raise InputError("seen")

    monkeypatch.setattr("sqft.verbs.judging.result_file", stop)
    for flags in ([], ["-v"], ["--json"], ["--threads", "2"], ["--limit", "3"], ["--validation-rows", "3"]):
        assert cli.run(["evaluate", "m", "--task", "piqa", *flags]) == 2
    with pytest.raises(InputError, match="seen"):
        verbs.evaluate("m", data="piqa")
    with pytest.raises(InputError, match="seen"):
        verbs.evaluate("m", data={"task": "piqa"}, limit=3)
    plain, verbose, as_json, threads, limited, cut, from_python, limited_from_python = places
    assert plain == verbose == as_json == threads == from_python
    assert limited == limited_from_python
    assert len({plain, limited, cut}) == 3
    # As it was named before there were functions: what was measured then is found.
    assert plain.name.endswith("-m-1735ec15.json")


@pytest.mark.parametrize(
    "command", [["evaluate", "m", "--task", "piqa"], ["verify", "m", "--base", "b", "--adapter", "a"]]
)
def test_an_out_that_cannot_be_written_is_refused_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out, reason in ((tmp_path / "file" / "sub" / "e.json", "Not a directory"), (tmp_path, "it is a folder")):
        assert cli.run([*command, "--out", str(out)]) == 2
        assert f"error: {out}: no result can be written there ({reason})" in capsys.readouterr().err


def test_a_failure_of_the_system_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_args: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr("sqft.model.inspect.inspect_model", fails)
    assert cli.run(["inspect", "m"]) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/somewhere'\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")]
)
def test_too_little_memory_is_said_with_what_to_lower(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("sqft.model.inspect.inspect_model", fails)
    assert cli.run(["inspect", "m"]) == 2
    assert "memory ran out; what is finished stays" in (message := capsys.readouterr().err)
    assert "finetune.batch" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "0"], "'0' is not a whole number of 1 or more"),
        (["--seed", "-1"], "'-1' is not a whole number of 0 to 4294967295"),
        (["--seed", "4294967296"], "'4294967296' is not a whole number of 0 to 4294967295"),
    ],
)
def test_numbers_out_of_bounds_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(["evaluate", "m", "--task", "piqa", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["search", "a", "out", "--base", "b", "--task", "piqa"],
        ["verify", "m", "--base", "b", "--adapter", "a", "--task", "piqa", "--out", "v.json"],
    ],
)
def test_code_of_the_model_is_trusted_for_its_tokenizer_too(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[bool] = []

    def stop(_folder: Path, *, trust_remote_code: bool = False) -> None:
        asked.append(trust_remote_code)
        raise InputError("seen")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sqft.context.load_tokenizer", stop)
    assert cli.run([*command, "--trust-remote-code"]) == 2
    assert cli.run(command) == 2
    assert asked == [True, False]


def test_the_help_of_tasks_knows_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["evaluate", "--help"])
    assert "recipe's" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "wanted"), [(["q_proj", "v_proj"], ["q_proj", "v_proj"]), (["q_proj"], ["q_proj"]), (["null"], None)]
)
def test_a_list_that_may_be_absent_takes_several_values(values: list[str], wanted: list[str] | None) -> None:
    options = parser().parse_args(["finetune", "m", "a", "--task", "gsm8k", "--target-modules", *values])
    assert FinetuneConfig.model_validate(given(options, FinetuneConfig)).target_modules == wanted


def test_an_unknown_flag_is_refused_with_its_commands_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(["merge", "base", "adapter", "out", "--alow-sparsity-loss"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: sqft merge ")
    assert message.endswith(
        "error: unrecognized arguments: --alow-sparsity-loss; did you mean --allow-sparsity-loss?\n"
    )
