"""Where every array lives: mesh axes, and the plan that maps logical axes to them.

Installed as `k2jax.sharding`.
"""

if __name__ != "k2jax.sharding":
    raise ImportError("import k2jax.sharding, not sharding; run `pip install -e .` once")

from k2jax.sharding.mesh import make, pretend
from k2jax.sharding.rules import BATCH, check, compute_spec, meshless, place, spec, storage_spec

__all__ = [
    "BATCH",
    "check",
    "compute_spec",
    "make",
    "meshless",
    "place",
    "pretend",
    "spec",
    "storage_spec",
]
