"""Bring whole matrices onto devices, orthogonalise them there, and send them back.

Everything here sees one device (`shard_map`). A leaf is [matrices, rows, columns]; what a mesh axis
splits at rest decides how it moves:

* an axis that splits the stack stays;
* one that splits rows or columns exchanges pieces for matrices (all-to-all);
* one that splits nothing picks its share, and the results are gathered over it.

Order within rows, within columns and within the stack is whatever the exchange leaves: the
iteration commutes with any permutation of them, and the way back undoes it.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from k2jax.params.matrices import Matrices
from k2jax.params.route import (
    SHARD_ABOVE_FLOPS,
    SLICE_BYTES,
    Leaf,
    Route,
    count_slots,
    group_leaves,
    is_even,
    route_group,
)

Iterate = Callable[[jax.Array, tuple[str, ...]], jax.Array]


def orthogonalise(
    leaves: dict[str, jax.Array],
    views: Mapping[str, Matrices],
    iterate: Iterate,
    shard_above_flops: float = SHARD_ABOVE_FLOPS,
    slice_bytes: int = SLICE_BYTES,
) -> dict[str, jax.Array]:
    """Run `iterate` on every matrix of every leaf; each leaf stays in its layout.

    Matrices of one shape are iterated on together, which compiles once; leaves of more than
    `slice_bytes` a device go by themselves, slice by slice.

    Args:
        leaves: all in the dtype of the exchange.
        views: their matrices.
        iterate: from [matrices, longer, shorter] and mesh axes that split the longer side.
        shard_above_flops: operations of a matrix above which several devices share it.
        slice_bytes: of matrices that a device holds whole at a time.
    """
    sizes = _mesh_sizes()
    described = {
        name: Leaf(u.shape, views[name], _layout(u)) for name, u in leaves.items() if u.size
    }
    itemsize = max((leaves[name].dtype.itemsize for name in described), default=0)
    done: dict[str, jax.Array] = {}
    for part in group_leaves(described, sizes, itemsize, slice_bytes):
        group = [described[name].upright() for name in part]
        routes = route_group(group, sizes, shard_above_flops) if is_explicit() else None
        us = [leaves[name] for name in part]
        done |= zip(part, _run_group(us, group, routes, iterate, slice_bytes), strict=True)
    return {name: done.get(name, u) for name, u in leaves.items()}


def is_explicit() -> bool:
    """Whether a mesh is in use whose axes are all explicit, so that layouts are known."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _mesh_sizes() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)


def _layout(u: jax.Array) -> tuple[tuple[str, ...], ...]:
    """Mesh axes that split each dim."""
    spec = jax.typeof(u).sharding.spec if is_explicit() else P()
    split = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return (*split, *[()] * (u.ndim - len(split)))


def _run_group(
    us: list[jax.Array],
    group: list[Leaf],
    routes: list[Route] | None,
    iterate: Iterate,
    slice_bytes: int,
) -> list[jax.Array]:
    """Leaves of one matrix shape, each as [matrices, longer side, shorter side]."""
    views = [leaf.view for leaf in group]
    _, longer, shorter = views[0].sizes(us[0].shape)
    each = max(1, slice_bytes // (longer * shorter * us[0].dtype.itemsize))

    def on_device(*us: jax.Array) -> list[jax.Array]:
        xs = [_stacked(u, view) for u, view in zip(us, views, strict=True)]
        if len(xs) > 1:
            ys = _iterate_together(xs, routes, iterate)
        else:
            ys = [_iterate_by_slices(xs[0], routes[0] if routes else None, iterate, each)]
        return [_unstacked(y, u, view) for y, u, view in zip(ys, us, views, strict=True)]

    if routes is None:
        return on_device(*us)
    specs = [jax.typeof(u).sharding.spec for u in us]
    return jax.shard_map(on_device, in_specs=tuple(specs), out_specs=specs, check_vma=False)(*us)


def _stacked(u: jax.Array, view: Matrices) -> jax.Array:
    dims = (view.stack, view.rows, view.columns)
    x = u.transpose([dim for part in dims for dim in part])
    return x.reshape([math.prod(u.shape[dim] for dim in part) for part in dims])


def _unstacked(x: jax.Array, u: jax.Array, view: Matrices) -> jax.Array:
    order = (*view.stack, *view.rows, *view.columns)
    x = x.reshape([u.shape[dim] for dim in order])
    return x.transpose([order.index(dim) for dim in range(u.ndim)])


def _iterate_together(
    xs: list[jax.Array], routes: list[Route] | None, iterate: Iterate
) -> list[jax.Array]:
    """Iterate once over the matrices of several leaves."""
    counts = [x.shape[0] for x in xs]
    starts = [sum(counts[:k]) for k in range(len(counts))]
    total = sum(counts)
    if routes is None or not (routes[0].stack or routes[0].longer):
        y = iterate(jnp.concatenate(xs), ()).astype(xs[0].dtype)
        return [y[first : first + count] for first, count in zip(starts, counts, strict=True)]
    slots = count_slots(routes)
    if is_even(routes):  # no padding: one after the other
        moved = [_to_devices(x, route) for x, route in zip(xs, routes, strict=True)]
        y = _iterate_part(jnp.concatenate(moved), routes[0], slots, total, iterate)
        cuts = [first // routes[0].over(routes[0].stack) for first in starts[1:]]
        parts = jnp.split(y, cuts)
        return [_from_devices(part, route) for part, route in zip(parts, routes, strict=True)]
    # Each leaf in slots of its own, zeros in the others: the sum holds all.
    y = jnp.zeros(())
    for x, route, first in zip(xs, routes, starts, strict=True):
        after = slots - first - x.shape[0]
        y = y.astype(x.dtype) + _to_devices(jnp.pad(x, ((first, after), (0, 0), (0, 0))), route)
    y = _iterate_part(y, routes[0], slots, total, iterate)
    return [
        _from_devices(y, route)[first : first + count]
        for route, first, count in zip(routes, starts, counts, strict=True)
    ]


def _iterate_by_slices(x: jax.Array, route: Route | None, iterate: Iterate, each: int) -> jax.Array:
    """Iterate on one leaf, `each` matrices a device at a time; the stack is padded with zeros."""
    count, over = x.shape[0], route.over(route.stack) if route else 1

    def one(x: jax.Array, real: int) -> jax.Array:
        if route is None:
            return iterate(x, ()).astype(x.dtype)
        x = _iterate_part(_to_devices(x, route), route, x.shape[0], real, iterate)
        return _from_devices(x, route)

    full = count // (each * over)
    rest = count - full * each * over
    parts = []
    if full:
        y = x[: count - rest].reshape(full, each * over, *x.shape[1:])
        # In place: compilers make a loop's new outputs, all zeros, before the step's first layer.
        y = jax.lax.fori_loop(0, full, lambda i, y: y.at[i].set(one(y[i], each * over)), y)
        parts.append(y.reshape(count - rest, *x.shape[1:]))
    if rest:
        padded = jnp.pad(x[count - rest :], ((0, -rest % over), (0, 0), (0, 0)))
        parts.append(one(padded, rest)[:rest])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _iterate_part(x: jax.Array, route: Route, slots: int, real: int, iterate: Iterate) -> jax.Array:
    """Iterate on what a device holds; do nothing where that is only padding."""

    def run(x: jax.Array) -> jax.Array:
        return iterate(x, route.longer).astype(x.dtype)

    over = route.over(route.stack)
    # Devices that share a matrix must all take part in its sums.
    if route.longer or real > slots - slots // over:
        return run(x)
    first = jax.lax.axis_index(route.stack) * (slots // over)
    return jax.lax.cond(first < real, run, lambda x: x, x)


def _to_devices(x: jax.Array, route: Route) -> jax.Array:
    """Exchange pieces of many matrices for few whole ones, or for their rows."""
    x = _to_stack(x, route)
    if route.turned:
        x = jax.lax.all_to_all(x, route.turned, split_axis=1, concat_axis=2, tiled=True)
    if route.sliced:
        size = x.shape[1] // route.over(route.sliced)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(route.sliced) * size, size, axis=1)
    return x


def _from_devices(x: jax.Array, route: Route) -> jax.Array:
    """Send back what `_to_devices` sent."""
    if route.sliced:
        x = jax.lax.all_gather(x, route.sliced, axis=1, tiled=True)
    if route.turned:
        x = jax.lax.all_to_all(x, route.turned, split_axis=2, concat_axis=1, tiled=True)
    return _from_stack(x, route)


def _to_stack(x: jax.Array, route: Route) -> jax.Array:
    """Move from [S, rows, columns] to [S / devices, more rows, more columns]."""
    pieces = route.pieces
    sizes = [route.over((axis,)) for axis in route.stack]
    x = x.reshape(*sizes, -1, *x.shape[-2:])
    for axis in reversed(route.picked):
        at = route.stack.index(axis)
        x = jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(axis), at, keepdims=False)
    if not pieces:
        return x
    n = [route.over((axis,)) for axis in pieces]
    each, height, width = x.shape[-3:]
    x = _swap(x.reshape(-1, each, height, width), pieces)
    x = x.reshape(*n, each, height, width)
    rows = [dim for dim, axis in enumerate(pieces) if axis in route.rows]
    columns = [dim for dim, axis in enumerate(pieces) if axis in route.columns]
    k = len(pieces)
    x = x.transpose(k, *rows, k + 1, *columns, k + 2)
    return x.reshape(each, -1, math.prod(n[dim] for dim in columns) * width)


def _swap(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Send the k-th part of x to the k-th device along `axes`."""
    # XLA's CPU backend cuts x into parts, and refuses those that a transpose before it gave
    # unlike layouts.
    x = jax.lax.optimization_barrier(x)
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)


def _from_stack(x: jax.Array, route: Route) -> jax.Array:
    """Undo `_to_stack`."""
    pieces = route.pieces
    each = x.shape[0]
    if pieces:
        n = [route.over((axis,)) for axis in pieces]
        rows = [dim for dim, axis in enumerate(pieces) if axis in route.rows]
        columns = [dim for dim, axis in enumerate(pieces) if axis in route.columns]
        height = x.shape[1] // math.prod(n[dim] for dim in rows)
        width = x.shape[2] // math.prod(n[dim] for dim in columns)
        k = len(pieces)
        x = x.reshape(each, *(n[dim] for dim in rows), height, *(n[dim] for dim in columns), width)
        order = [k, *rows, k + 1, *columns, k + 2]
        x = x.transpose([order.index(dim) for dim in range(k + 3)])
        x = _swap(x.reshape(-1, each, height, width), pieces)
        x = x.reshape(*n, each, height, width)
    else:
        height, width = x.shape[-2:]
    for axis in route.picked:  # in the stack's order, so that all before it are there
        x = jax.lax.all_gather(x, axis, axis=route.stack.index(axis))
    return x.reshape(-1, height, width)
