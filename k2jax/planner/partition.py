"""How a mesh cuts the parameters, and whether it divides the model."""

import functools
import math

from k2jax.config import MeshConfig, ModelConfig
from k2jax.params.spec import ParamSpec
from k2jax.sharding.table import LAYOUT, STORAGE, split


def count_shards(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> int:
    """Count the parts that the mesh cuts a parameter into; `gathered`: while it is used."""
    return _axes_and_shards(leaf.axes, mesh, gathered)[1]


def device_size(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> float:
    """Count the numbers of a parameter that a device holds."""
    return leaf.size / count_shards(leaf, mesh, gathered)


def shard_axes(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> tuple[str, ...]:
    """Find the mesh axes that split a parameter."""
    return _axes_and_shards(leaf.axes, mesh, gathered)[0]


@functools.cache
def _axes_and_shards(
    axes: tuple[str, ...], mesh: MeshConfig, gathered: bool
) -> tuple[tuple[str, ...], int]:
    sizes = mesh.sizes
    kept = [axis for axis in axes if not (gathered and axis in STORAGE)]
    names = tuple(name for axis in kept for name in split(axis, sizes))
    return names, math.prod(sizes[name] for name in names)


def indivisible_axis(cfg: ModelConfig, mesh: MeshConfig, context: int) -> str:
    """Find the logical axis that the mesh does not divide; empty where it divides all."""
    sizes = mesh.sizes
    for axis in LAYOUT:
        if axis in ("batch", "cache") or (axis == "ffw" and not cfg.dense_layers):
            continue
        size = context if axis == "length" else cfg.size(axis)
        if size % math.prod(sizes[name] for name in split(axis, sizes)):
            return axis
    return ""
