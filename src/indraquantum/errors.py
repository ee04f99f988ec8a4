"""Errors that a user can mend. The command line prints them as one line and leaves with the exit status given here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Input that is wrong: the message names the field, the value and what is allowed. Exit status 2."""

    exit_status = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: got {value!s}; {allowed}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Cross from a worker process to its parent."""
        return type(self), (self.field, str(self.value), self.allowed)


class Unreachable(UserError):
    """What was to be downloaded can't be, and is not here either."""


def all_or_missing(actions: Iterable[Callable[[], T]]) -> list[T]:
    """What each of `actions` gives; where one can't be reached, the others are tried too, so that all is said at once.

    Raises:
        UserError: of the first that fails otherwise, at once; or one error of all that fail, in one line.
    """
    found, missing = [], []
    for action in actions:
        try:
            found.append(action())
        except UserError as error:
            if not missing and not isinstance(error, Unreachable):
                raise
            missing.append(error)
    if missing:
        first, *others = missing
        raise Unreachable(first.field, first.value, ". ".join([first.allowed, *map(str, others)]))
    return found


class TrainingStopped(Exception):
    """A guard stopped training before a bad update. Exit status 3."""

    exit_status = 3


def reason(error: Exception) -> str:
    """What an error of another package says, short and on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


@contextlib.contextmanager
def optional_package(field: str, value: object, package: str, install: str) -> Iterator[None]:
    """Import a package that is no dependency inside this: where it is missing, or broken, one line says what to do.

    Args:
        field: what asks for the package, such as an option.
        value: what stands there.
        package: its name.
        install: what to give to `pip install`.

    Raises:
        UserError: the import failed, in whatever way.
    """
    try:
        yield
    except Exception as error:  # an installation that is broken, or a version that does not fit, raises anything
        allowed = (
            f"needs the package {package}, which can't be imported here ({reason(error)}): pip install '{install}'"
        )
        raise UserError(field, value, allowed) from None
