"""What devices send each other: rows in pieces of any size, and weights they share.

Everything here sees one device of a mesh axis (`shard_map`).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Axes = str | tuple[str, ...]


class Pieces(NamedTuple):
    """What every device of the axis sends to every expert, and back; int32 [senders, experts].

    Experts lie on the devices in order. Each device holds the whole tables, so each knows the way
    there and the way back.
    """

    first: jax.Array  # row of the sender where the piece begins
    size: jax.Array  # rows; may be 0
    place: jax.Array  # row where it goes, on the device of the expert


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_over(part: jax.Array, axes: Axes, dim: int, travels: str | None) -> jax.Array:
    """The whole of an array that mesh axes split along `dim`.

    Its gradient is `scatter_sum`, sent in the dtype `travels`; None: its own.
    """
    return jax.lax.all_gather(part, axes, axis=dim, tiled=True)


def all_to_all(a: jax.Array, axis: str, split: int, join: int) -> jax.Array:
    """`a`, cut along one dim among the devices of the axis; what comes is joined along another."""
    if jax.lax.axis_size(axis) == 1:
        return a
    return jax.lax.all_to_all(a, axis, split, join, tiled=True)


def scatter_sum(whole: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """The sum of the arrays along mesh axes, each device its part along `dim`.

    Along the last dim pieces first, and the others as one: TPUs would else all-reduce.
    """
    last = dim == whole.ndim - 1
    between_processes = jax.default_backend() == "cpu" and jax.process_count() > 1
    if not (last or between_processes):
        return jax.lax.psum_scatter(whole, axes, scatter_dimension=dim, tiled=True)
    before, length, after = whole.shape[:dim], whole.shape[dim], whole.shape[dim + 1 :]
    part = (*before, length // jax.lax.axis_size(axes), *after)
    rows = whole.reshape(math.prod(before), -1, math.prod(part[dim:]))
    pieces = jnp.moveaxis(rows, 1, 0)
    if between_processes:
        # The reduce-scatter of gloo, the network of CPUs, at times adds what the other side has
        # overwritten: the end of the first device's part is wrong (jax issue 40830).
        return jax.lax.all_to_all(pieces, axes, 0, 0, tiled=True).sum(axis=0).reshape(part)
    return jax.lax.psum_scatter(pieces, axes, scatter_dimension=0).reshape(part)


gather_over.defvjp(
    lambda part, axes, dim, travels: (gather_over(part, axes, dim, travels), None),
    lambda axes, dim, travels, _, dy: (
        scatter_sum(dy.astype(travels or dy.dtype), axes, dim).astype(dy.dtype),
    ),
)


def exchange(
    rows: jax.Array, pieces: Pieces, into: jax.Array, axis: str, back: bool = False
) -> jax.Array:
    """`into` with the rows that this device receives written over its own.

    Args:
        rows: [M, ...], what it sends.
        pieces: which of them go where; those of one receiver do not overlap.
        into: [L, ...].
        axis: of the mesh.
        back: from the experts' devices to where the pieces came from.

    It is not to be differentiated: JAX's gradient of it (0.10 to 0.12) loses rows where a piece is
    empty, and what it is needed for is the opposite exchange. XLA's CPU backend has no ragged
    all-to-all; there all rows are gathered, and each device picks its own.
    """
    return jax.lax.platform_dependent(
        rows, into, *_own(pieces, axis, back),
        cpu=functools.partial(_picked, axis=axis),
        default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axis),
    )  # fmt: skip


def _own(pieces: Pieces, axis: str, back: bool) -> tuple[jax.Array, ...]:
    """This device's pieces: where each begins, its rows, where it goes; rows of those it receives.

    As many for every other device as that has experts.
    """
    me, devices = jax.lax.axis_index(axis), pieces.size.shape[0]
    sender = lambda table_PE: table_PE[me]
    owner = lambda table_PE: table_PE.reshape(devices, devices, -1)[:, me].reshape(-1)
    if back:
        return owner(pieces.place), owner(pieces.size), owner(pieces.first), sender(pieces.size)
    return sender(pieces.first), sender(pieces.size), sender(pieces.place), owner(pieces.size)


def _picked(
    rows: jax.Array, into: jax.Array, first_S: jax.Array, size_S: jax.Array, place_S: jax.Array,
    _: jax.Array, *, axis: str,
) -> jax.Array:  # fmt: skip
    """The same by gathering: S pieces a device, a device's experts of them for each other one."""
    me, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    from_all = lambda a_S: jax.lax.all_gather(a_S, axis).reshape(devices, devices, -1)[:, me]
    first_PX, size_PX, place_PX = map(from_all, (first_S, size_S, place_S))
    begin_PX = first_PX + jnp.arange(devices)[:, None] * rows.shape[0]
    within_PXL = jnp.arange(into.shape[0]) - place_PX[..., None]
    mine_PXL = (within_PXL >= 0) & (within_PXL < size_PX[..., None])
    row_L = jnp.where(mine_PXL, begin_PX[..., None] + within_PXL, 0).sum(axis=(0, 1))
    everyones = jax.lax.all_gather(rows, axis, tiled=True)
    mine_L = mine_PXL.any(axis=(0, 1)).reshape(-1, *(1,) * (into.ndim - 1))
    return jnp.where(mine_L, everyones[row_L], into)
