"""Make the device mesh, real or pretended. All axes are explicit."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from k2jax.config import MESH_AXES, ConfigError, MeshConfig
from k2jax.sharding import torus
from k2jax.sharding.rules import Declared, check_divisible
from k2jax.sharding.table import INFERENCE_AXES

_TYPES = (AxisType.Explicit,) * len(MESH_AXES)


def make_mesh(config: MeshConfig) -> Mesh:
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
    return mesh_over(devices[: config.devices], config)


def mesh_over(devices: Sequence[Any], config: MeshConfig) -> Mesh:
    """A mesh over these devices, as near to each other as what they send asks for.

    Raises:
        ConfigError: slices of unlike sizes, or `replica` is no multiple of their number.
    """
    return Mesh(across(devices, config), MESH_AXES, axis_types=_TYPES)


def inference_mesh(mesh: Mesh, specs: Mapping[str, Declared]) -> Mesh:
    """A mesh for inference over a mesh's devices: `replica`, `expert` and `model` only.

    Devices along `data` and `context` join those along `model`, so that weights are split as far
    as in training; where that does not divide the model, they become replicas.

    Args:
        mesh: of training, or one for inference already.
        specs: the parameters.

    Raises:
        ConfigError: neither divides the model.
    """
    if mesh.axis_names == INFERENCE_AXES:
        return mesh
    try:
        return _join(mesh, specs, "model", (0, 2, 1, 3, 4))
    except ConfigError:
        return _join(mesh, specs, "replica", (0, 1, 3, 2, 4))


def _join(mesh: Mesh, specs: Mapping[str, Declared], into: str, order: tuple[int, ...]) -> Mesh:
    sizes = dict(mesh.shape)
    sizes[into] *= sizes["data"] * sizes["context"]
    sizes = {axis: sizes[axis] for axis in INFERENCE_AXES}
    check_divisible(specs, sizes)
    types = (AxisType.Explicit,) * len(INFERENCE_AXES)
    devices = mesh.devices.transpose(order).reshape(tuple(sizes.values()))
    return Mesh(devices, INFERENCE_AXES, axis_types=types)


def slices(devices: Sequence[Any]) -> dict[int, list[Any]]:
    """TPU devices by slice. Elsewhere a `slice_index` means less: GPU nodes have a fast network."""
    by_slice: dict[int, list[Any]] = {}
    for device in devices:
        slice_ = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        by_slice.setdefault(slice_, []).append(device)
    return dict(sorted(by_slice.items()))


def across(devices: Sequence[Any], config: MeshConfig) -> np.ndarray:
    """Devices in the mesh's shape, each slice a stretch of `replica`.

    Raises:
        ConfigError: slices of unlike sizes, or `replica` is no multiple of their number.
    """
    by_slice = slices(devices)
    sizes = {index: len(part) for index, part in by_slice.items()}
    if len(set(sizes.values())) > 1:
        taken = ", ".join(f"{count} devices of slice {index}" for index, count in sizes.items())
        raise ConfigError(f"mesh {config} takes {taken}; it must take as many of each")
    each = torus.part_of_slice(config, len(by_slice))
    return np.concatenate([_laid(part, each) for part in by_slice.values()], axis=0)


def _laid(devices: list[Any], config: MeshConfig) -> np.ndarray:
    """Devices of one slice in the mesh's shape; TPUs that fill a box as `torus.order` says."""
    if devices[0].platform != "tpu":
        return create_device_mesh(config.shape, devices)
    places = np.array([device.coords for device in devices])
    shape = tuple(int(size) for size in places.max(axis=0) - places.min(axis=0) + 1)
    cores = 1 + max(device.core_on_chip for device in devices)
    if math.prod(shape) * cores == len(devices):
        dims = torus.order(shape, config, cores)
        devices = sorted(devices, key=lambda d: (*(d.coords[dim] for dim in dims), d.core_on_chip))
    return np.array(devices, dtype=object).reshape(config.shape)


@contextlib.contextmanager
def use_mesh_of(*arrays: Any) -> Iterator[None]:
    """Use the mesh that arrays lie on, where none is in use and nothing is being traced.

    Weights that training returns stay on its mesh; what is computed from them needs it.
    """
    leaves = jax.tree.leaves(arrays)
    if not jax.sharding.get_abstract_mesh().empty or any(
        isinstance(array, jax.core.Tracer) for array in leaves
    ):
        yield
        return
    layouts = [array.sharding for array in leaves if isinstance(array, jax.Array)]
    named = [layout.mesh for layout in layouts if isinstance(layout, jax.NamedSharding)]
    meshes = [mesh for mesh in named if isinstance(mesh, Mesh)]
    with jax.set_mesh(meshes[0]) if meshes else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def use_abstract_mesh(config: MeshConfig) -> Iterator[AbstractMesh]:
    """Trace as if on the mesh's devices; none is needed and nothing can be computed."""
    mesh = AbstractMesh(config.shape, MESH_AXES, axis_types=_TYPES)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh
