"""The errors of sqft, and a collector that raises all problems of an input at once.

Policy: a message says what, where (the module or file), the numbers, and the remedy. Bad input is collected with
:class:`Problems` and raised once, before the expensive step, so that a user can fix everything in one go. The command
line prints the message without a traceback and exits with :attr:`SqftError.exit_code`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class SqftError(Exception):
    """Base of every error that `sqft` raises on purpose; the message is for the user."""

    exit_code = 2


class InputError(SqftError, ValueError):
    """The recipe, the model, the data or the machine cannot be used as given."""


class SplitAbsentError(InputError):
    """A data set has no such split here; a mix of tasks may do without one member's."""


class NumericalError(SqftError):
    """A computation produced NaN, Inf or a singular matrix."""


class ProcessLostError(SqftError):
    """One of the processes that share a command has ended before the others."""


class Problems:
    """Collects every problem of an input, so that all are reported at once.

    Used as a context manager: leaving the block raises :class:`InputError` when anything was added.

    >>> with Problems("recipe quickstart.yaml") as problems:
    ...     problems.add("sparsity is 1.2; choose a number between 0 and 1")
    Traceback (most recent call last):
    ...
    sqft.errors.InputError: recipe quickstart.yaml: sparsity is 1.2; choose a number between 0 and 1
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one problem, to be raised with the others at the end of the block. Duplicates are listed once."""
        if message not in self._messages:
            self._messages.append(message)

    def extend(self, messages: Iterable[str]) -> None:
        """Note several problems."""
        for message in messages:
            self.add(message)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what `action` returns; where it raises an error of ours, note that and return None."""
        try:
            return action()
        except SqftError as error:
            self.add(str(error))
            return None

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise all problems as one :class:`InputError`; return when there are none."""
        if not self._messages:
            return
        if len(self._messages) == 1:
            raise InputError(f"{self.where}: {self._messages[0]}")
        # A message may itself be a list of problems.
        lines = "\n".join(f"  {i}. " + m.replace("\n", "\n   ") for i, m in enumerate(self._messages, 1))
        raise InputError(f"{self.where}: {len(self._messages)} problems\n{lines}")
