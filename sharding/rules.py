"""Plans: which mesh axes, if any, split each logical axis."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from k2jax.config import ConfigError
from k2jax.sharding.table import BATCH, STORAGE, split


class Declared(Protocol):
    """A parameter as laying it out needs it."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical name of each dim."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dim."""


def meshless() -> bool:
    """Whether no mesh is set: then every array is whole, on one device."""
    return jax.sharding.get_abstract_mesh().empty


def is_for_cpu() -> bool:
    """Whether what is traced will run on CPUs: on the mesh in use, else by default."""
    if meshless():
        return jax.default_backend() == "cpu"
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def spec(*axes: str | None) -> P | None:
    """PartitionSpec of an activation with these logical axes; None where no mesh is set."""
    return None if meshless() else storage_spec(axes)


def storage_spec(axes: Iterable[str | None]) -> P:
    """Where a parameter with these logical axes rests."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return P(*(_entry(split(axis, sizes)) for axis in axes))


def compute_spec(axes: Iterable[str | None]) -> P:
    """Where a parameter with these logical axes is used: storage splits gathered."""
    return storage_spec(None if axis in STORAGE else axis for axis in axes)


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def axes_of(*logical: str) -> tuple[str, ...]:
    """Axes of the mesh in use that split any of these logical axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for axis in logical for name in split(axis, sizes))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` moved to the layout of an activation with these logical axes."""
    return x if meshless() else jax.reshard(x, storage_spec(axes))


class Share(NamedTuple):
    """What one process feeds of every batch."""

    parts: list[int]  # their numbers, ascending
    of: int  # parts of the batch: the mesh splits its rows so many ways
    first: list[bool]  # of each part: whether no process with a lower number has it too


def batch_share() -> Share:
    """The parts of a batch that this process's devices take, on the mesh in use.

    A process may have several, not always adjacent, and share one with others (`model` and
    `context` do not split rows).
    """
    return Share([0], 1, [True]) if meshless() else _share(jax.sharding.get_mesh())


@functools.cache
def _share(mesh: jax.sharding.Mesh) -> Share:
    over = split("batch", mesh.shape)
    assert mesh.axis_names[: len(over)] == over
    return share(mesh.devices, jax.process_index(), len(over))


def share(devices: np.ndarray, process: int, leading: int = len(BATCH)) -> Share:
    """The parts of a batch that a process takes.

    Args:
        devices: in the shape of the mesh, the axes that split rows first.
        process: its number.
        leading: how many axes split rows.
    """
    rows = devices.reshape(math.prod(devices.shape[:leading]), -1)
    holders = [{device.process_index for device in row} for row in rows]
    parts = [part for part, held in enumerate(holders) if process in held]
    return Share(parts, len(holders), [min(holders[part]) == process for part in parts])


def check_divisible(
    specs: Mapping[str, Declared], mesh: Mapping[str, int], context: int = 0
) -> None:
    """Refuse a mesh that does not divide the model.

    Args:
        specs: the parameters.
        mesh: devices along each axis, of training or of inference.
        context: tokens in a row, which training splits.

    Raises:
        ConfigError: names the logical axis, its size, and the nearest mesh sizes that work.
    """
    lengths = {
        axis: size
        for leaf in specs.values()
        for axis, size in zip(leaf.axes, leaf.shape, strict=True)
    } | {"length": context}
    lengths["heads_of_row"] = lengths.get("heads", 0)
    for axis, size in lengths.items():
        over = split(axis, mesh)
        ways = math.prod(mesh[name] for name in over)
        if size % ways:
            shown = " ".join(f"{name}={n}" for name, n in mesh.items() if n > 1)
            raise ConfigError(
                f"mesh {shown} splits {axis!r} (size {size}) {ways} ways over {' x '.join(over)};"
                f" {_near(size, ways)}"
            )


def _near(size: int, ways: int) -> str:
    works = [n for n in range(1, size + 1) if size % n == 0]
    below = max(n for n in works if n < ways)
    above = [n for n in works if n > ways]
    return f"{below} would divide it" if not above else f"{below} or {above[0]} would divide it"
