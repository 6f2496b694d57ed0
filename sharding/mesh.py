"""Make the device mesh, real or pretended. All axes are explicit."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from k2jax.config import MESH_AXES, ConfigError, MeshConfig

_TYPES = (AxisType.Explicit,) * len(MESH_AXES)


def make(config: MeshConfig) -> Mesh:
    """A mesh over the first devices of this process group; use it with `jax.set_mesh`.

    Raises:
        ConfigError: there are fewer devices than the mesh takes.
    """
    devices = jax.devices()
    if config.devices > len(devices):
        raise ConfigError(
            f"mesh {config} takes {config.devices} devices, there are {len(devices)};"
            " set --mesh.AXIS sizes whose product fits"
        )
    return jax.make_mesh(
        config.shape, MESH_AXES, axis_types=_TYPES, devices=devices[: config.devices]
    )


@contextlib.contextmanager
def pretend(config: MeshConfig) -> Iterator[AbstractMesh]:
    """Trace as if on the mesh's devices; none is needed and nothing can be computed."""
    mesh = AbstractMesh(config.shape, MESH_AXES, axis_types=_TYPES)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh
