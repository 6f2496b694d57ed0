"""Where every array lives: mesh axes, and the plan that maps logical axes to them.

Installed as `k2jax.sharding`. Names load on first use: `table` must come without jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "k2jax.sharding":
    raise ImportError("import k2jax.sharding, not sharding; run `pip install -e .` once")

if TYPE_CHECKING:
    from k2jax.sharding.mesh import inference_mesh, make_mesh, mesh_over, use_abstract_mesh
    from k2jax.sharding.rules import (
        axes_of,
        batch_share,
        check_divisible,
        compute_spec,
        is_for_cpu,
        meshless,
        reshard,
        spec,
        storage_spec,
    )
    from k2jax.sharding.table import BATCH

_MESH = ("inference_mesh", "make_mesh", "mesh_over", "use_abstract_mesh", "use_mesh_of")
_HOMES = dict.fromkeys(_MESH, "mesh") | {"BATCH": "table"}

__all__ = [
    "BATCH",
    "axes_of",
    "batch_share",
    "check_divisible",
    "compute_spec",
    "inference_mesh",
    "is_for_cpu",
    "make_mesh",
    "mesh_over",
    "meshless",
    "reshard",
    "spec",
    "storage_spec",
    "use_abstract_mesh",
    "use_mesh_of",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in __all__:
        raise AttributeError(f"module 'k2jax.sharding' has no attribute {name!r}")
    return getattr(importlib.import_module(f"k2jax.sharding.{_HOMES.get(name, 'rules')}"), name)
