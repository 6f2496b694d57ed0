"""Memory, time and cost of a run on given hardware: formulas, a search over meshes, compilers.

`targets.parse` describes machines, `search.search` tries every mesh; `k2jax.plan` does both.
"""

from k2jax.planner import search, targets

__all__ = ["search", "targets"]
