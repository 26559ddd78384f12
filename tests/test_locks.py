"""Locks: one process at a time, and file systems that have none."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from sqft.errors import InputError
from sqft.locks import exclusive, making, run_lock


@pytest.mark.parametrize("lock", [run_lock, exclusive, making])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_no_other_process(
    lock: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING", "sqft"), lock(tmp_path / "out"):
        pass
    assert "the file system has no locks" in caplog.text


def test_another_process_is_one(tmp_path: Path) -> None:
    for lock in (run_lock, making):
        with lock(tmp_path / "out"), pytest.raises(InputError, match="another sqft process"), lock(tmp_path / "out"):
            raise AssertionError("both at work")


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made there"), making(tmp_path / "file" / "out"):
        pass
