"""How a mesh lies on a torus of TPU chips, and what share of its links each axis then has.

Read without jax: `k2jax plan` reckons with it, `mesh` lays out devices by it.
"""

import functools
import itertools
import math
from collections.abc import Iterable

from k2jax.config import MESH_AXES, MeshConfig


@functools.cache
def order(shape: tuple[int, ...], mesh: MeshConfig, cores: int = 1) -> tuple[int, ...]:
    """Dims of the torus from the outermost in: the mesh is laid over them row by row.

    A rule, not a search: the order that suits tokens to their experts; of such orders the one that
    suits heads over `context`, then sums over `model`, then weights. An exchange between all
    devices of a group is as slow as the longest dim that the group spans, so `expert=128` on
    8x8x16 takes 8x8x2 rather than 8x16.

    Args:
        shape: chips along each dim, of one slice.
        mesh: its last axis is innermost.
        cores: devices of a chip, inside of all dims.
    """

    def speeds(dims: tuple[int, ...]) -> list[float]:
        laid = tuple(shape[dim] for dim in dims)
        found = lambda axis, everyone: links([axis], mesh, laid, cores, everyone)
        exchanged = [found(axis, True) for axis in ("expert", "context")]
        return exchanged + [found(axis, False) for axis in ("model", "data", "expert")]

    return max(itertools.permutations(range(len(shape))), key=speeds)


def links(
    axes: Iterable[str], mesh: MeshConfig, laid: tuple[int, ...], cores: int, everyone: bool
) -> float:
    """Links of the torus, one way, that a device has for a collective over `axes`.

    A part of a dim is a line (one link) or, the whole of it, a ring (two); an axis that skips
    chips shares its links with the groups between, and devices of a chip share them too.

    Args:
        axes: of the mesh.
        mesh: its last axis is innermost.
        laid: chips along each dim, outermost first.
        cores: devices of a chip.
        everyone: each device of the group has something else for each other one.

    Returns:
        Infinity where nothing leaves the chip.
    """
    together, slowest = 0.0, math.inf
    for size, stride, whole in _parts(set(axes), mesh, laid, cores):
        mine = (2.0 if whole and size > 2 else 1.0) / stride / cores
        together += mine
        # Ring: a byte to everybody travels size/4 links on average, over both directions.
        slowest = min(slowest, mine * 4 / size if size > 2 else mine)
    return slowest if everyone else together or math.inf


def _parts(
    axes: set[str], mesh: MeshConfig, laid: tuple[int, ...], cores: int
) -> list[tuple[int, int, bool]]:
    """For each dim that the axes use: (steps, distance of a step, whether it is all)."""
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
    return [(steps, far, steps * far >= laid[dim]) for dim, (steps, far) in taken.items()]
