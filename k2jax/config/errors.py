"""A user's mistakes: one line that names the thing, and the nearest right thing."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

LENGTH = 300  # characters of another package's message


class ConfigError(ValueError):
    """A run was described in a way that cannot work; the message says what to change."""


LEAST, MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32, subnormal numbers aside


def check_float32(name: str, value: Any) -> None:
    """Refuse a finite number that float32 makes 0 or infinite; what is no number passes.

    Raises:
        ConfigError: names it.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or value == 0:
        return
    if not LEAST <= abs(value) <= MOST:
        far = "0" if abs(value) < LEAST else "infinite"
        raise ConfigError(f"{name} is {value:g}; it would be {far} in float32")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the list of all names where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


def one_line(error: BaseException, typed: bool = False) -> str:
    """Return the start of an error's message on one line.

    Args:
        error: any exception; without a message its type is returned.
        typed: put the type in front, for errors of other packages that say little without it.
    """
    text, name = " ".join(str(error).split())[:LENGTH], type(error).__name__
    if not text:
        return name
    return f"{name}: {text}" if typed else text
