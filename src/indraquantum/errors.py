"""Errors that a user can mend. The command line prints them as one line and leaves with the exit status given here."""

from __future__ import annotations


class UserError(Exception):
    """Input that is wrong: the message names the field, the value and what is allowed. Exit status 2."""

    exit_status = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: got {value!s}; {allowed}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Cross from a worker process to its parent."""
        return type(self), (self.field, str(self.value), self.allowed)


class TrainingStopped(Exception):
    """A guard stopped training before a bad update. Exit status 3."""

    exit_status = 3
