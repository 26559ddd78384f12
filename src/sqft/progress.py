"""Progress of long work: a bar in a terminal, an occasional log line otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_SECONDS_A_LINE = 30.0


@contextmanager
def progress(total: int, what: str, unit: str) -> Iterator[Callable[[int], Any]]:
    """Yield a function to call with the number of further units done.

    Args:
        total: units there are.
        what: the work, such as 'merging'.
        unit: what is counted, in the singular.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=unit, leave=False) as bar:
            yield bar.update
        return
    done, started = 0, time.monotonic()
    said = started

    def update(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        if 0 < done < total and now - said >= _SECONDS_A_LINE:
            left = (now - started) / done * (total - done)
            logger.info("%s: %d of %d %ss, about %s left", what, done, total, unit, _duration(left))
            said = now

    yield update


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
