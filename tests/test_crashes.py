"""Every state that a kill can leave is one that the next run goes on from; see crashes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import forked

WORK = Path(__file__).with_name("crashing_work.py")
# Named sqft, as the command is: the package then imports no torch before it is needed, and a fork costs little.
DRIVER = (
    "import sys; more = sys.argv[1:]; sys.argv[:] = ['sqft']; sys.path.insert(0, {tests!r}); "
    "import crashing_work; crashing_work.main(more)"
)


@pytest.mark.parametrize("work", ["stage", "resumed_stage", "result", "damaged_order"])
def test_a_kill_at_any_change_of_a_folder(work: str, tmp_path: Path) -> None:
    code = DRIVER.format(tests=str(WORK.parent))
    done = subprocess.run([sys.executable, "-c", code, work, str(tmp_path)], capture_output=True, text=True)
    if work == "damaged_order":  # an order of steps that loses its way must be found out
        assert done.returncode != 0
        assert "after a kill before change" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "stride"),
    [("teacher", 17), ("sparsify", 47), ("quantize", 61), ("finetune", 41), ("search", 53), ("merge", 43)],
)
def test_a_kill_in_any_stage(work: str, stride: int, tmp_path: Path) -> None:
    """Some of the changes; `make crashes` takes every one."""
    # In a process that has imported all, so that its children need not, under the profile that kills.
    done = forked.run([work, str(tmp_path), str(stride)], script=WORK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= 3
