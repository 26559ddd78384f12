"""Many forwards of one model that wait for each other at its parts, so that a part is in memory once for all of them.

What a block is given (masks, position tables, what lies between blocks) is for the model's own forward to say. So each
forward runs as it is, in a thread of its own that stops wherever the model calls a part. When all of them have stopped,
the part is read, run once for each of them, and dropped. No two of the threads ever run at the same time.
"""

from __future__ import annotations

from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager


class _Dropped(BaseException):
    """Ends a forward that nobody waits for; not an Exception, which a model's code may catch."""


class Forward(Thread):
    """One forward, which stops at the parts of its model.

    Attributes:
        part: the part that it has stopped at; None before it began and after it ended.
        result: what it returned, once it has ended.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        """Take what to run; it begins with the first :meth:`go_on`."""
        super().__init__(daemon=True)
        self.part: str | None = None
        self.result: Any = None
        context = copy_context()  # without it a thread begins in an empty one
        self._run = lambda: context.run(run)
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._stops: SimpleQueue[tuple[str | None, Any]] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()

    def run(self) -> None:
        """See threading.Thread; go_on() starts it."""
        # Masks and norms are computed here, the parts elsewhere: a pool of threads for each forward would be idle.
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                self.result = self._run()
            self._stops.put((None, None))
        except BaseException as error:
            self._stops.put((None, error))

    def ask(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stop in this thread until there is an answer, and return it."""
        self._stops.put((part, (args, kwargs)))
        answer = self._answers.get()
        if isinstance(answer, _Dropped):
            raise answer
        return answer

    def go_on(self, answer: Any = None) -> None:
        """Run on to the next part, or to the end, with what the last part has answered.

        Raises:
            BaseException: whatever the forward raised.
        """
        if self.ident is None:
            threads = torch.get_num_threads()
            self.start()
            self.part, given = self._stops.get()
            torch.set_num_threads(threads)
        else:
            self._answers.put(answer)
            self.part, given = self._stops.get()
        if isinstance(given, BaseException) and not isinstance(given, _Dropped):
            raise given
        self._given = given or ((), {})

    def through(self, module: Callable[..., Any]) -> None:
        """Run the part that it has stopped at, and go on."""
        args, kwargs = self._given
        self._given = ((), {})
        with torch.no_grad():
            answer = module(*args, **kwargs)
        del args, kwargs
        self.go_on(answer)

    def drop(self) -> None:
        """End it, wherever it is."""
        if self.part is not None:
            self.go_on(_Dropped())
        if self.ident is not None:
            self.join()


def stop_at(part: str) -> Callable[..., Any]:
    """Return what a part's stand-in calls: `call(hidden, args, kwargs)`."""

    def call(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cast("Forward", current_thread()).ask(part, (hidden, *args), kwargs)

    return call


def run_parts(
    forwards: Iterable[Forward], opened: Callable[[str], AbstractContextManager[Callable[..., Any]]], last: str
) -> None:
    """Run forwards that have stopped at a part until each has stopped at the part `last` or has ended.

    Args:
        forwards: of one model.
        opened: gives a part by its name, in memory as long as it is needed.
        last: the part that is not run.
    """
    forwards = list(forwards)
    while stopped := [f for f in forwards if f.part not in (None, last)]:
        part = cast("str", stopped[0].part)
        with opened(part) as module:
            for forward in stopped:
                if forward.part == part:
                    forward.through(module)
