"""How a mesh cuts the parameters, and whether it divides the model."""

import functools
import math

from k2jax.config import MeshConfig, ModelConfig
from k2jax.params.spec import ParamSpec
from k2jax.sharding.table import STORAGE, TRAIN, split


def count_shards(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> int:
    """Into how many parts the mesh cuts a parameter; `gathered`: while it is used."""
    return math.prod([getattr(mesh, axis) for axis in shard_axes(leaf, mesh, gathered)])


def device_size(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> float:
    """Numbers of a parameter that a device holds."""
    return leaf.size / count_shards(leaf, mesh, gathered)


def shard_axes(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> tuple[str, ...]:
    """Mesh axes that split a parameter."""
    return _shard_axes(leaf.axes, mesh, gathered)


@functools.cache
def _shard_axes(axes: tuple[str, ...], mesh: MeshConfig, gathered: bool) -> tuple[str, ...]:
    kept = [axis for axis in axes if not (gathered and axis in STORAGE)]
    return tuple(name for axis in kept for name in split(axis, mesh.sizes))


def indivisible_axis(cfg: ModelConfig, mesh: MeshConfig, context: int) -> str:
    """Why the mesh does not divide the model: the logical axis; empty where it does."""
    sizes = mesh.sizes
    for axis in TRAIN:
        if axis == "batch" or (axis == "ffw" and not cfg.dense_layers):
            continue
        size = context if axis == "length" else cfg.size(axis)
        if size % math.prod(sizes[name] for name in split(axis, sizes)):
            return axis
    return ""
