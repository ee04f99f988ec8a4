"""The key of a server of OpenAI's API: `indra serve` asks for it, and a capture from a server gives it."""

from __future__ import annotations

from indraquantum.errors import UserError

API_KEY = "INDRA_API_KEY"  # the environment variable


def usable_key(field: str, key: str) -> str:
    """Return `key` without blanks and line ends around it.

    Raises:
        UserError: no header of a request can hold it. The message does not show it.
    """
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise refused_key(field)
    return key


def refused_key(field: str) -> UserError:
    """Return the error for a key that can't be used, without the key."""
    return UserError(field, "a key", "must be of printable ASCII characters only")
