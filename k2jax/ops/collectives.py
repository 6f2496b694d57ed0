"""Collectives that the network needs: gathers, sums, and exchanges of slices of any size.

Everything here runs on one device of a mesh axis (`shard_map`). Along axes of one device nothing
is communicated: XLA's CPU backend would copy the array, in a layout of its choice.
"""

import functools
import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Axes = str | tuple[str, ...]
Tree = TypeVar("Tree")


class RowSlices(NamedTuple):
    """Slices of rows that devices of an axis send to experts, and back; int32 [senders, experts].

    Experts are on the devices in order. Each device has the whole tables, and so knows what it
    sends and what it receives, in both directions.
    """

    start: jax.Array  # first row, on the sender
    size: jax.Array  # rows; may be 0
    target: jax.Array  # first row, on the device of the expert


def entry_axes(entry: Axes | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def split_axes(axes: Axes) -> tuple[str, ...]:
    """Those of the mesh axes that have more than one device."""
    return tuple(name for name in entry_axes(axes) if jax.lax.axis_size(name) > 1)


def sum_over(a: Tree, axes: Axes) -> Tree:
    """Sum an array, or each of a tree, over the devices along mesh axes."""
    names = split_axes(axes)
    return jax.lax.psum(a, names) if names else a


def all_gather(part: jax.Array, axes: Axes, dim: int = 0) -> jax.Array:
    """Gather an array that mesh axes split along `dim`."""
    names = split_axes(axes)
    return jax.lax.all_gather(part, names, axis=dim, tiled=True) if names else part


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_over(part: jax.Array, axes: Axes, dim: int, grad_comm_dtype: str | None) -> jax.Array:
    """Gather an array that mesh axes split along `dim`.

    Its gradient is `scatter_sum`, communicated in `grad_comm_dtype`; None: in its own dtype.
    """
    return all_gather(part, axes, dim)


def all_to_all(a: jax.Array, axis: str, split: int, join: int) -> jax.Array:
    """Split `a` along one dim among the devices of the axis; join what arrives along another."""
    if jax.lax.axis_size(axis) == 1:
        return a
    return jax.lax.all_to_all(a, axis, split, join, tiled=True)


def scatter_sum(whole: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Sum the arrays along mesh axes; each device keeps its part along `dim`.

    The last dim is moved to the front, and the others are merged: TPUs would else all-reduce.
    """
    names = split_axes(axes)
    if not names:
        return whole
    last = dim == whole.ndim - 1
    between_processes = jax.default_backend() == "cpu" and jax.process_count() > 1
    if not (last or between_processes):
        return jax.lax.psum_scatter(whole, names, scatter_dimension=dim, tiled=True)
    before, length, after = whole.shape[:dim], whole.shape[dim], whole.shape[dim + 1 :]
    part = (*before, length // jax.lax.axis_size(names), *after)
    rows = whole.reshape(math.prod(before), -1, math.prod(part[dim:]))
    parts = jnp.moveaxis(rows, 1, 0)
    if between_processes:
        # The reduce-scatter of gloo, the network of CPUs, sometimes adds what the other side
        # has overwritten: the end of the first device's part is wrong (jax issue 40830).
        return jax.lax.all_to_all(parts, names, 0, 0, tiled=True).sum(axis=0).reshape(part)
    return jax.lax.psum_scatter(parts, names, scatter_dimension=0).reshape(part)


gather_over.defvjp(
    lambda part, axes, dim, grad_comm_dtype: (gather_over(part, axes, dim, grad_comm_dtype), None),
    lambda axes, dim, grad_comm_dtype, _, dy: (
        scatter_sum(dy.astype(grad_comm_dtype or dy.dtype), axes, dim).astype(dy.dtype),
    ),
)


def ragged_exchange(
    rows: jax.Array, slices: RowSlices, into: jax.Array, axis: str, back: bool = False
) -> jax.Array:
    """Write the rows that this device receives over those of `into`.

    Args:
        rows: [M, ...], rows to send from.
        slices: which of them are sent where; those of one receiver do not overlap.
        into: [L, ...].
        axis: of the mesh.
        back: send from the experts' devices back to the senders.

    Do not differentiate it: JAX's gradient of it (0.10 to 0.12) loses rows where a slice is empty.
    Its callers write theirs as the opposite exchange. XLA's CPU backend has no ragged all-to-all;
    there all rows are gathered, and each device picks its own.
    """
    return jax.lax.platform_dependent(
        rows,
        into,
        *_local_slices(slices, axis, back),
        cpu=functools.partial(_exchange_by_gather, axis=axis),
        default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axis),
    )


def _local_slices(slices: RowSlices, axis: str, back: bool) -> tuple[jax.Array, ...]:
    """Slices of this device: start, size and target of those it sends, size of those it receives.

    There are as many for every other device as that has experts.
    """
    device, devices = jax.lax.axis_index(axis), slices.size.shape[0]
    from_here = RowSlices(*(table_PE[device] for table_PE in slices))
    to_here = RowSlices(
        *(table_PE.reshape(devices, devices, -1)[:, device].reshape(-1) for table_PE in slices)
    )
    if back:
        return to_here.target, to_here.size, to_here.start, from_here.size
    return from_here.start, from_here.size, from_here.target, to_here.size


def _exchange_by_gather(
    rows: jax.Array,
    into: jax.Array,
    start_S: jax.Array,
    size_S: jax.Array,
    target_S: jax.Array,
    _: jax.Array,
    *,
    axis: str,
) -> jax.Array:
    """Compute `ragged_exchange` by gathering all rows; S slices a device."""
    device, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    start_PX, size_PX, target_PX = (
        jax.lax.all_gather(a_S, axis).reshape(devices, devices, -1)[:, device]
        for a_S in (start_S, size_S, target_S)
    )
    begin_PX = start_PX + jnp.arange(devices)[:, None] * rows.shape[0]
    within_PXL = jnp.arange(into.shape[0]) - target_PX[..., None]
    hit_PXL = (within_PXL >= 0) & (within_PXL < size_PX[..., None])
    row_L = jnp.where(hit_PXL, begin_PX[..., None] + within_PXL, 0).sum(axis=(0, 1))
    all_rows = jax.lax.all_gather(rows, axis, tiled=True)
    hit_L = hit_PXL.any(axis=(0, 1)).reshape(-1, *(1,) * (into.ndim - 1))
    return jnp.where(hit_L, all_rows[row_L], into)
