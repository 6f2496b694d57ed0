"""Mistakes of a user: one line that names the thing, and the nearest right thing."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A run was described in a way that cannot work; the message says what to change."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
