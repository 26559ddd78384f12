"""What the command line says where something fails that should not, and where a terminal is narrow."""

from pathlib import Path
from typing import Any

import pytest

from sqft import cli
from sqft.cli import commands
from sqft.cli.tables import show_rows
from sqft.errors import InputError
from sqft.recipe import EvaluateConfig, Recipe, SearchConfig, SparsifyConfig


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("x"), 1, "unexpected KeyError at"),
        (TypeError("wrong"), 1, "unexpected TypeError at"),
        (MemoryError(), 2, "memory ran out"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "memory ran out"),
        (RuntimeError("something else"), 1, "unexpected RuntimeError at"),
        (InputError("of the user's"), 2, "error: of the user's"),
        (FileNotFoundError(2, "No such file", "x"), 2, "No such file"),
    ],
)
def test_every_error_is_one_message(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(commands, "inspect", fail)
    assert cli.run(["inspect", "x"]) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert ("Please report it" in printed) == (code == 1)


def test_more_is_said_when_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Any) -> int:
        raise KeyError("x")

    monkeypatch.setattr(commands, "inspect", fail)
    assert cli.run(["inspect", "x", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_table_that_does_not_fit_is_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"model": "Sparse INT4, tuned", "accuracy": "53.3 %", "size": "101 MB"}]
    monkeypatch.setenv("COLUMNS", "90")
    show_rows("quickstart", rows)
    assert "│" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "20")
    show_rows("quickstart", rows)
    printed = capsys.readouterr().out
    assert "Sparse INT4, tuned\n  accuracy: 53.3 %\n  size: 101 MB\n" in printed


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.model_validate({"name": "r", "model": "~/m", "data": {"task": "x"}})
    assert recipe.model == f"{tmp_path}/m"
    assert SparsifyConfig(mask="~/mask").mask == f"{tmp_path}/mask"
    assert SearchConfig(ranks_file="~/r").ranks_file == f"{tmp_path}/r"
    assert EvaluateConfig(baselines=["~/b", "c~"]).baselines == [f"{tmp_path}/b", "c~"]
    assert cli.run(["inspect", "~/none"]) == 2
    assert cli.run(["inspect", "~nobody of this name"]) == 2, "a name that begins with ~ is no home folder"
    assert SparsifyConfig(mask="~no such user/mask").mask == "~no such user/mask"


def test_bad_input_is_a_value_error_too() -> None:
    assert issubclass(InputError, ValueError)
