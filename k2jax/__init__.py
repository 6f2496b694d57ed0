"""Kimi K2 in JAX and Flax: train, evaluate and sample a mixture of experts."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `import k2jax` and `import k2jax.optim` stay light.
_HOMES = {
    "ConfigError": "k2jax.config",
    "ModelConfig": "k2jax.config",
    "RunConfig": "k2jax.config",
    "ParamSpec": "k2jax.params.spec",
    "Model": "k2jax.model",
    "convert": "k2jax.conversion",
    "forward": "k2jax.model",
    "generate": "k2jax.inference.generate",
    "load": "k2jax.weights.source",
    "muonclip": "k2jax.optim",
    "train": "k2jax.training.loop",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'k2jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return [*globals(), *__all__]
