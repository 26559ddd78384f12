"""Every state that a kill can leave is one that the next run goes on from; see crashes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DRIVER = "import sys; sys.path.insert(0, {tests!r}); import crashing_work; crashing_work.main(sys.argv[1:])"


@pytest.mark.parametrize("work", ["stage", "resumed_stage", "result", "damaged_order"])
def test_a_kill_at_any_change_of_a_folder(work: str, tmp_path: Path) -> None:
    done = run(work, tmp_path)
    if work == "damaged_order":  # an order of steps that loses its way must be found out
        assert done.returncode != 0
        assert "after a kill before change" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 5


def run(work: str, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    code = DRIVER.format(tests=str(TESTS))
    return subprocess.run([sys.executable, "-c", code, work, str(root), *more], capture_output=True, text=True)
