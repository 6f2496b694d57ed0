"""Packages that only some data needs."""

import importlib
from types import ModuleType

from k2jax.config import ConfigError


def import_optional(name: str, remedy: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(f"this data needs the package {package}: {remedy}") from None
