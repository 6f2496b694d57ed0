"""Kimi K2 in JAX and Flax: train, convert, plan, evaluate and generate.

    import k2jax

    model = k2jax.train("tiny", "runs/tiny")          # or k2jax.load("runs/tiny")
    k2jax.evaluate(model)["bits_per_byte"]
    k2jax.generate(model, ["def "])
    k2jax.plan("kimi_k2", "v5p:8x8x16")["mesh"]

`k2jax.optim` is the optimizer for other training loops. Every name loads on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where the public names live. Loading them on first use keeps `import k2jax` light.
_HOMES = {
    "ConfigError": "k2jax.config",
    "Model": "k2jax.model",
    "ModelConfig": "k2jax.config",
    "ParamSpec": "k2jax.params.spec",
    "RunConfig": "k2jax.config",
    "configure": "k2jax.configs",
    "convert": "k2jax.conversion",
    "describe": "k2jax.commands.describe",
    "evaluate": "k2jax.commands.evaluate",
    "forward": "k2jax.model",
    "generate": "k2jax.inference.generate",
    "load": "k2jax.weights.source",
    "muonclip": "k2jax.optim",
    "plan": "k2jax.commands.plan",
    "prepare": "k2jax.runtime.backend",
    "read_metrics": "k2jax.training.metrics",
    "train": "k2jax.commands.train",
}
_ROOMS = ("configs", "optim", "planner", "sharding")

__all__ = list(_HOMES)
__all__ += list(_ROOMS)


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name in _ROOMS:
        return importlib.import_module(f"k2jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'k2jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
