"""Checkpoints of our own, and published ones. Orbax is imported by the first save or restore."""

from k2jax.checkpoint.run import Checkpoints, warm

__all__ = ["Checkpoints", "warm"]
