"""Check an optimizer's numbers when it is made, not by a loss that rises."""

import math
from typing import Any

import jax.numpy as jnp

from k2jax.config import ConfigError, check_float32

FLOATS = ("float64", "float32", "bfloat16", "float16")


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse a plain number outside of low..high or of float32; schedules, traced numbers pass.

    Raises:
        ConfigError: names the argument.
    """
    if value is None or isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    if isinstance(value, int | float) and not low <= value <= high:
        room = f"at least {low:g}" if high == math.inf else f"in {low:g}..{high:g}"
        raise ConfigError(f"{name} is {value}; it must be {room}")
    check_float32(name, value)


def floating(name: str, dtype: Any) -> None:
    """Refuse what is no dtype of real numbers.

    Raises:
        ConfigError: names the argument.
    """
    known = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if known not in FLOATS:
        raise ConfigError(f"{name} is {known!r}; there are: {', '.join(FLOATS)}")
