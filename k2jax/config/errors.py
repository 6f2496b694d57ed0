"""A user's mistakes: one line that names the thing, and the nearest right thing."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A run was described in a way that cannot work; the message says what to change."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the list of all names where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an error's message on one line of at most `limit` characters; without one its type."""
    text = " ".join(str(error).split())
    return text[:limit] if text else type(error).__name__
