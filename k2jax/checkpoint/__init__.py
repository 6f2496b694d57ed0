"""Checkpoints of our own, and published ones. Orbax is imported by the first save or restore."""

from k2jax.checkpoint.engine import warm
from k2jax.checkpoint.published import load_published, to_published
from k2jax.checkpoint.run import Checkpoints

__all__ = ["Checkpoints", "load_published", "to_published", "warm"]
