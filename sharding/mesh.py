"""Make the device mesh, real or pretended. All axes are explicit."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from k2jax.config import MESH_AXES, ConfigError, MeshConfig

_TYPES = (AxisType.Explicit,) * len(MESH_AXES)


def make(config: MeshConfig) -> Mesh:
    """A mesh over the first devices of this process group; use it with `jax.set_mesh`.

    Across TPU slices only `replica` runs: their network is the slow one.

    Raises:
        ConfigError: there are fewer devices than the mesh takes, or it does not fit the slices.
    """
    devices = jax.devices()
    if config.devices > len(devices):
        raise ConfigError(
            f"mesh {config} takes {config.devices} devices, there are {len(devices)};"
            " set --mesh.AXIS sizes whose product fits"
        )
    devices = devices[: config.devices]
    if len(slices(devices)) > 1:
        return Mesh(across(devices, config), MESH_AXES, axis_types=_TYPES)
    return jax.make_mesh(config.shape, MESH_AXES, axis_types=_TYPES, devices=devices)


def slices(devices: Sequence[Any]) -> dict[int, list[Any]]:
    """TPU devices by slice. Elsewhere a `slice_index` means less: GPU nodes have a fast network."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        slice_ = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        found.setdefault(slice_, []).append(device)
    return dict(sorted(found.items()))


def across(devices: Sequence[Any], config: MeshConfig) -> np.ndarray:
    """Devices in the mesh's shape, each slice a stretch of `replica`.

    Raises:
        ConfigError: slices of unlike sizes, or `replica` is no multiple of their number.
    """
    from jax.experimental.mesh_utils import create_device_mesh

    found = slices(devices)
    sizes = {index: len(part) for index, part in found.items()}
    if len(set(sizes.values())) > 1:
        taken = ", ".join(f"{count} devices of slice {index}" for index, count in sizes.items())
        raise ConfigError(f"mesh {config} takes {taken}; it must take as many of each")
    if config.replica % len(found):
        up = math.lcm(config.replica, len(found))
        raise ConfigError(
            f"mesh.replica is {config.replica}; there are {len(found)} slices and only replica runs"
            f" across them: set it to {up} or another multiple of {len(found)}"
        )
    shape = (config.replica // len(found), *config.shape[1:])
    parts = [create_device_mesh(shape, part) for part in found.values()]
    return np.concatenate(parts, axis=0)


@contextlib.contextmanager
def pretend(config: MeshConfig) -> Iterator[AbstractMesh]:
    """Trace as if on the mesh's devices; none is needed and nothing can be computed."""
    mesh = AbstractMesh(config.shape, MESH_AXES, axis_types=_TYPES)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh
