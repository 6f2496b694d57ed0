"""Save and resume a run. Orbax is imported by the first save or restore."""

from k2jax.checkpoint.checkpoints import Checkpoints
from k2jax.checkpoint.orbax_io import preload_orbax

__all__ = ["Checkpoints", "preload_orbax"]
