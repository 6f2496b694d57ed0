"""How fast mesh axes talk on a target: torus links, NVLink within a node, cards between nodes.

A mesh is laid over the devices in the order of MESH_AXES, the last axis innermost; over a torus as
`torus.order` has it. What a collective costs is the bytes that a device sends, over the bandwidth
that its group of axes has.
"""

import math
from collections.abc import Iterable

from k2jax.config import MESH_AXES, MeshConfig
from k2jax.planner.targets import Target
from k2jax.sharding import torus

# Bytes a device sends in a step: kind of collective -> mesh axes joined by "+" -> bytes.
Wire = dict[str, dict[str, float]]
ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


def group(axes: Iterable[str], mesh: MeshConfig) -> tuple[str, int]:
    """Name and size of the group of devices along these axes; axes of size 1 are left out."""
    used = [axis for axis in MESH_AXES if axis in set(axes) and getattr(mesh, axis) > 1]
    return "+".join(used), math.prod(getattr(mesh, axis) for axis in used)


def add(wire: Wire, kind: str, axes: Iterable[str], mesh: MeshConfig, size: float) -> None:
    """Count a collective over `axes` of `size` bytes, the larger of what goes in and comes out.

    On a ring of n an all-gather or reduce-scatter sends (n-1)/n of it, an all-reduce twice that;
    an all-to-all sends (n-1)/n too.
    """
    name, ways = group(axes, mesh)
    if ways == 1 or not size:
        return
    sent = size * (ways - 1) / ways * (2 if kind == "all-reduce" else 1)
    row = wire.setdefault(kind, {})
    row[name] = row.get(name, 0.0) + sent


def seconds(wire: Wire, mesh: MeshConfig, target: Target) -> float:
    """Time to send everything, one collective after the other."""
    return sum(
        sent / bandwidth(axes.split("+"), mesh, target, kind)
        for kind, row in wire.items()
        for axes, sent in row.items()
    )


def bandwidth(axes: Iterable[str], mesh: MeshConfig, target: Target, kind: str) -> float:
    """Bytes a second that a device sends in a collective over these axes."""
    names, sizes = set(axes), [getattr(mesh, axis) for axis in MESH_AXES]
    inside = target.devices // target.slices
    # Strides of the axes, in devices.
    strides = {axis: math.prod(sizes[i + 1 :]) for i, axis in enumerate(MESH_AXES) if axis in names}
    crossing = any(strides[axis] * getattr(mesh, axis) > inside for axis in strides)
    if target.slices > 1 and crossing:
        return target.chip.network / target.chip.devices
    if target.chip.kind == "tpu":
        return _torus(names, mesh, target, kind)
    return _nodes(strides, mesh, target, kind)


def _nodes(strides: dict[str, int], mesh: MeshConfig, target: Target, kind: str) -> float:
    """GPUs: NVLink in the node; between nodes the cards of all members in it work together."""
    chip, node = target.chip, target.shape[-1]
    if chip.kind == "cpu":
        return chip.link
    ways = math.prod(getattr(mesh, axis) for axis in strides)
    local = math.prod(_within(strides[axis], getattr(mesh, axis), node) for axis in strides)
    if local >= ways:
        return chip.link
    if kind in ALL_TO_ALL:  # each byte to another node passes its own device's card
        return chip.network * (ways - 1) / (ways - local)
    return min(chip.link, chip.network * local)


def _within(stride: int, size: int, node: int) -> int:
    """How many steps of an axis stay in one node."""
    return min(size, max(1, node // stride))


def _torus(axes: set[str], mesh: MeshConfig, target: Target, kind: str) -> float:
    """TPUs: by the links that the axes have where the mesh lies best."""
    chip, exchanged = target.chip, kind in ALL_TO_ALL
    dims = torus.order(target.shape, mesh, chip.devices)
    laid = tuple(target.shape[dim] for dim in dims)
    links = torus.links(axes, mesh, laid, chip.devices, exchanged)
    if math.isinf(links):  # between the two devices of a chip: far faster than any link
        return chip.bandwidth / chip.devices
    # `links` counts what a device keeps of an all-to-all, a Wire does not.
    ways = math.prod(getattr(mesh, axis) for axis in axes)
    return links * chip.link * ((ways - 1) / ways if exchanged else 1)
