"""The errors in input and settings, which you can correct: one family below `IndraError`.

From Python a message names the argument (`data`, `micro_batch_tokens`). The command line prints the same message with
the option's name (`--data`, `--micro-batch-tokens`) and exits with the status given here. So each message is written
once, with the options' names, and `worded` replaces them by Python's names for a reader in Python.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
_QUOTED_OR_OPTION = re.compile(rf"`[^`]*`|{_OPTION.pattern}")
_SHOWN_IN_CAPITALS = {"CHECKPOINT": "checkpoint", "FOLDER": "folder"}  # arguments without an option
_options_are_named = False

# What the system may refuse for any file, and what the message then asks for.
_REFUSALS = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS), "must be on a writable disk with free space"
)
_REFUSALS |= dict.fromkeys((errno.EACCES, errno.EPERM), "must be accessible to you; check its permissions")
_REFUSALS[errno.ENAMETOOLONG] = "must be a shorter path"


@contextlib.contextmanager
def options_named() -> Iterator[None]:
    """Inside, messages name options as the command line spells them; outside, the arguments of Python's functions."""
    global _options_are_named
    before, _options_are_named = _options_are_named, True
    try:
        yield
    finally:
        _options_are_named = before


def are_options_named() -> bool:
    """Return whether messages name options now."""
    return _options_are_named


def worded(text: str) -> str:
    """Return a message for its reader: in Python, `--no-teacher` is `no_teacher`. Quoted commands do not change."""
    return text if _options_are_named else _QUOTED_OR_OPTION.sub(_as_argument, text)


def _as_argument(found: re.Match[str]) -> str:
    text = found[0]
    if not text.startswith("`"):
        return f"`{_plain_name(text)}`"
    return _plain_name(text) if text.startswith("`--") else text


def as_option(name: str) -> str:
    """Return the option of a setting: of `batch_tokens` it is `--batch-tokens`, and of `as_` it is `--as`."""
    return "--" + name.rstrip("_").replace("_", "-")


def _plain_name(text: str) -> str:
    return _OPTION.sub(lambda option: option[1].replace("-", "_"), text)


class IndraError(Exception):
    """The base of all errors of this package that you can correct."""

    exit_status = 1  # of the command line
    is_told = False  # whether another process tells it, so that the command line of this one has nothing to add


class InvalidInput(IndraError, ValueError):
    """An argument, a setting or a file is wrong; the message names it, its value and what is allowed.

    Attributes:
        field: the argument as the command line spells it.
        value: what was given.
        allowed: what is allowed, with the options' names of the command line.
    """

    exit_status = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(field, value, allowed)

    def __str__(self) -> str:
        field = self.field if _options_are_named else _plain_name(_SHOWN_IN_CAPITALS.get(self.field, self.field))
        return f"{field}: got {self.value!s}; {worded(self.allowed)}"

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str, str]]:
        """Cross from a worker process to its parent."""
        return type(self), (self.field, str(self.value), self.allowed)


UserError = InvalidInput  # its name inside this package


class Unreachable(InvalidInput):
    """A file can't be downloaded, and is not on this machine either."""


class OutOfMemory(InvalidInput):
    """The memory of this process does not suffice. Other processes of its run may have enough, so it ends alone."""


class TrainingStopped(IndraError):
    """A guard stopped training before a bad update."""

    exit_status = 3

    def __str__(self) -> str:
        return worded(super().__str__())


class ProcessLost(IndraError):
    """Another process of the run ended, so this one can't continue."""


class TrainingInterrupted(IndraError, KeyboardInterrupt):
    """A signal stopped `train` after a step and a checkpoint. It is a KeyboardInterrupt.

    Attributes:
        signal: the name of the signal, such as SIGTERM.
    """

    exit_status = 130

    def __init__(self, signal: str) -> None:
        self.signal = signal
        super().__init__(signal)

    def __str__(self) -> str:
        return worded(f"training was stopped by {self.signal}; the same call with --resume auto resumes it")


class Problem(NamedTuple):
    """The first value that pydantic refused."""

    place: tuple[int | str, ...]  # the names that lead to the field
    value: Any
    allowed: str


def first_problem(error: ValidationError) -> Problem:
    """Return the first problem of a ValidationError, in this program's words."""
    first = error.errors(include_url=False)[0]
    allowed = first["msg"].replace("Input should", "must").removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = "there is no such setting"
    return Problem(first["loc"], first["input"], allowed)


def refused_setting(error: ValidationError, where: str = "", known: Iterable[str] = ()) -> InvalidInput:
    """Return the first problem as an error; `where` comes before the setting's name, and `known` has all names."""
    first = first_problem(error)
    name, allowed = ".".join(map(str, first.place)), first.allowed
    if near := error.errors()[0]["type"] == "extra_forbidden" and difflib.get_close_matches(name, known, n=1):
        allowed = f"{allowed}; did you mean {near[0]}?"
    return InvalidInput(f"{where}{name}", first.value, allowed)


def refused_by_system(error: OSError) -> InvalidInput | None:
    """Return the error for a full disk, a missing permission or a long path; None for others, whose trace is needed."""
    if error.errno not in _REFUSALS:
        return None
    return InvalidInput(f"{error.filename or 'output'}"[:200], error.strerror, _REFUSALS[error.errno])


def all_or_missing(actions: Iterable[Callable[[], T]]) -> list[T]:
    """Return the results of all `actions`. If one can't be downloaded, try the others too and report all at once.

    Raises:
        UserError: the first other error, at once; or one error about all downloads that failed, in one line.
    """
    found: list[T] = []
    missing: list[UserError] = []
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


def reason(error: Exception) -> str:
    """Return the message of another package's error, short and on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


@contextlib.contextmanager
def optional_package(field: str, value: object, package: str, install: str) -> Iterator[None]:
    """Import an optional package inside this. If it is missing or broken, one line says what to do.

    Args:
        field: what needs the package, such as an option.
        value: the value of that option.
        package: the name of the package.
        install: what to give to `pip install`.

    Raises:
        UserError: the import failed.
    """
    try:
        yield
    except Exception as error:  # a broken installation, or a version that does not fit, may raise anything
        allowed = (
            f"needs the package {package}, which can't be imported here ({reason(error)}): pip install '{install}'"
        )
        raise UserError(field, value, allowed) from None
