"""The weights of a model on a mesh for inference."""

import contextlib
import math
from collections.abc import Iterator

import jax

from k2jax.config import ModelConfig
from k2jax.params.arrays import Params
from k2jax.params.kimi import declare_kimi
from k2jax.params.low_bit_parts import map_parts
from k2jax.params.spec import ParamSpec
from k2jax.sharding import axes_of, inference_mesh, meshless, storage_spec


def batch_ways() -> int:
    """Count the parts in which the mesh in use splits a batch; they divide its rows."""
    shape = jax.sharding.get_abstract_mesh().shape
    return 1 if meshless() else math.prod(shape[axis] for axis in axes_of("cache"))


@contextlib.contextmanager
def decoding(params: Params, cfg: ModelConfig) -> Iterator[Params]:
    """Put the weights on a mesh for inference, of the devices on which they are."""
    mesh = None if meshless() else jax.sharding.get_mesh()
    if mesh is None or "data" not in mesh.shape:
        yield params
        return
    with jax.set_mesh(inference_mesh(mesh, declare_kimi(cfg))):
        yield lay_out(params, cfg, jax.sharding.get_mesh())


def lay_out(params: Params, cfg: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
    """Lay weights on a mesh, or on one device; nothing is copied where it has its part."""
    if mesh is None:
        return jax.device_put(params, jax.devices()[0])
    specs = declare_kimi(cfg)
    with jax.set_mesh(mesh):
        return {name: map_parts(a, specs[name], _lay) for name, a in params.items()}


def _lay(leaf: jax.Array, spec: ParamSpec) -> jax.Array:
    layout = jax.NamedSharding(jax.sharding.get_mesh(), storage_spec(spec.axes))
    # Of all devices: every process must come to the same end.
    before = leaf.sharding.devices_indices_map(leaf.shape)
    if before != layout.devices_indices_map(leaf.shape):
        return jax.device_put(leaf, layout)
    parts = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, layout, parts)
