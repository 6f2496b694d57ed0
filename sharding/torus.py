"""How a mesh lies on a torus of TPU chips, and what share of its links each axis then has.

Read without jax: `k2jax plan` reckons with it, `mesh` lays out devices by it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

from k2jax.config import MESH_AXES, ConfigError, MeshConfig


def part_of_slice(mesh: MeshConfig, slices: int) -> MeshConfig:
    """Cut a mesh into the part that one slice holds: a stretch of `replica`, all other axes.

    Raises:
        ConfigError: `replica` is no multiple of the slices.
    """
    if mesh.replica % slices:
        up = math.lcm(mesh.replica, slices)
        raise ConfigError(
            f"mesh.replica is {mesh.replica}; there are {slices} slices and only replica runs"
            f" across them: set it to {up} or another multiple of {slices}"
        )
    return dataclasses.replace(mesh, replica=mesh.replica // slices)


@functools.cache
def order(shape: tuple[int, ...], mesh: MeshConfig, cores: int = 1) -> tuple[int, ...]:
    """Order the dims of the torus from the outermost in: the mesh is laid over them row by row.

    A rule, not a search: the order that suits tokens to their experts; of such orders the one that
    suits heads over `context`, then sums over `model`, then weights. An exchange between all
    devices of a group is as slow as the longest dim that the group spans, so `expert=128` on
    8x8x16 takes 8x8x2 rather than 8x16.

    Args:
        shape: chips along each dim, of one slice.
        mesh: its last axis is innermost.
        cores: devices of a chip, inside of all dims.
    """

    def links_of_axes(dims: tuple[int, ...]) -> list[float]:
        laid = tuple(shape[dim] for dim in dims)
        exchanges = [links([axis], mesh, laid, cores, True) for axis in ("expert", "context")]
        sums = [links([axis], mesh, laid, cores, False) for axis in ("model", "data", "expert")]
        return exchanges + sums

    return max(itertools.permutations(range(len(shape))), key=links_of_axes)


def links(
    axes: Iterable[str], mesh: MeshConfig, laid: tuple[int, ...], cores: int, exchanged: bool
) -> float:
    """Count the links of the torus, one way, that a device has for a collective over `axes`.

    A part of a dim is a line (one link), the whole of a dim that closes a ring (two); an axis that
    skips chips shares its links with the groups between, and devices of a chip share them too.
    A group whose sizes do not divide the dims is taken for a box that is near it.

    Args:
        axes: of the mesh.
        mesh: its last axis is innermost.
        laid: chips along each dim, outermost first.
        cores: devices of a chip.
        exchanged: each device of the group has something else for each other one; its bytes, those
            for itself included, over this are what the busiest link carries.

    Returns:
        Infinity where nothing leaves the chip.
    """
    together, slowest, closed = 0.0, math.inf, rings(laid)
    for dim, (size, stride) in _parts(set(axes), mesh, laid, cores).items():
        ring = dim in closed and size * stride >= laid[dim]
        own = (2.0 if ring else 1.0) / stride / cores
        together += own
        # Half of a line has half of its bytes for the other half: size / 4 over the middle link.
        slowest = min(slowest, own * 4 / size)
    return slowest if exchanged else together or math.inf


def rings(shape: tuple[int, ...]) -> set[int]:
    """Find the dims of a slice whose two ends are linked.

    Slices of v5p and tpu7x are cubes of 4x4x4 and close along every dim; smaller ones do not. v6e
    is linked at the ends of a whole pod only, 16 chips; its coordinates may have a third dim of 1.
    Source: Cloud TPU documentation, "TPU architecture" and the page of each version.
    """
    cubes = len(shape) == 3 and all(size % 4 == 0 for size in shape)
    return {dim for dim, size in enumerate(shape) if cubes or size == 16}


def _parts(
    axes: set[str], mesh: MeshConfig, laid: tuple[int, ...], cores: int
) -> dict[int, tuple[int, int]]:
    """For each dim that the axes use: steps, and the distance of a step."""
    taken: dict[int, tuple[int, int]] = {}
    begin = 1  # devices between neighbours along the axis
    for axis, size in zip(reversed(MESH_AXES), reversed(mesh.shape), strict=True):
        end, inner = begin * size, cores
        for dim in reversed(range(len(laid))):
            low, high = max(begin, inner), min(end, inner * laid[dim])
            if axis in axes and high > low:
                steps, far = max(2, high // low), max(1, low // inner)
                old = taken.get(dim)
                taken[dim] = (steps * old[0], min(far, old[1])) if old else (steps, far)
            inner *= laid[dim]
        begin = end
    return taken
