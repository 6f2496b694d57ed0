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
from typing import Any

import jax
import jax.numpy as jnp

from k2jax.optim.route import LARGE, Route, entries, explicit, routes, sizes_of_axes
from k2jax.optim.views import Matrices

SLICE = 2**27  # bytes of matrices that a device holds whole at a time
Iterate = Callable[[jax.Array, tuple[str, ...]], jax.Array]


def orthogonalise(
    leaves: dict[str, jax.Array],
    views: Mapping[str, Matrices],
    iterate: Iterate,
    large: float = LARGE,
    slice_bytes: int = SLICE,
) -> dict[str, jax.Array]:
    """`iterate` on every matrix of every leaf; each leaf stays in its layout.

    Matrices of one shape are iterated on together, which compiles once; leaves of more than
    `slice_bytes` a device go by themselves, slice by slice.

    Args:
        leaves: in the dtype of the exchange.
        views: their matrices.
        iterate: from [matrices, longer, shorter] and mesh axes that split the longer side.
        large: operations of a matrix above which several devices share it.
        slice_bytes: of matrices that a device holds whole at a time.
    """
    groups: dict[Any, list[str]] = {}
    size: dict[Any, float] = {}
    for name, u in leaves.items():
        if not u.size:
            continue
        count, rows, columns = views[name].sizes(u.shape)
        spec = entries(jax.typeof(u).sharding.spec, u.ndim) if explicit() else [()] * u.ndim
        stacked = tuple(axis for dim in views[name].stack for axis in spec[dim])
        key = (*sorted((rows, columns)), stacked)
        groups.setdefault(key, []).append(name)
        ways = math.prod(sizes_of_axes().get(axis, 1) for axis in sum(spec, ()))
        size[key] = size.get(key, 0) + count * rows * columns * u.dtype.itemsize / ways
    done: dict[str, jax.Array] = {}
    for key, group in groups.items():
        for part in [group] if size[key] <= slice_bytes else [[name] for name in group]:
            us, vs = [leaves[name] for name in part], [views[name] for name in part]
            done |= zip(part, _group(us, vs, iterate, large, slice_bytes), strict=True)
    return {name: done.get(name, u) for name, u in leaves.items()}


def _group(us, views, iterate: Iterate, large: float, slice_bytes: int) -> list[jax.Array]:
    """Leaves of one matrix shape, each as [matrices, longer side, shorter side]."""
    views = [_upright(view, u.shape) for view, u in zip(views, us, strict=True)]
    _, longer, shorter = views[0].sizes(us[0].shape)
    ways = None
    if explicit():
        specs = [jax.typeof(u).sharding.spec for u in us]
        ways = routes([u.shape for u in us], views, specs, large)
    each = max(1, slice_bytes // (longer * shorter * us[0].dtype.itemsize))

    def on_device(*us: jax.Array) -> list[jax.Array]:
        xs = [_stacked(u, view) for u, view in zip(us, views, strict=True)]
        if len(xs) > 1:
            ys = _together(xs, ways, iterate)
        else:
            ys = [_by_slices(xs[0], ways[0] if ways else None, iterate, each)]
        return [_unstacked(y, u, view) for y, u, view in zip(ys, us, views, strict=True)]

    if ways is None:
        return on_device(*us)
    return jax.shard_map(on_device, in_specs=tuple(specs), out_specs=specs, check_vma=False)(*us)


def _upright(view: Matrices, shape: tuple[int, ...]) -> Matrices:
    """The longer side as rows: a transposed matrix has the transposed result."""
    _, rows, columns = view.sizes(shape)
    return view if rows >= columns else Matrices(view.columns, view.rows, view.stack)


def _stacked(u: jax.Array, view: Matrices) -> jax.Array:
    dims = (view.stack, view.rows, view.columns)
    x = u.transpose([dim for part in dims for dim in part])
    return x.reshape([math.prod(u.shape[dim] for dim in part) for part in dims])


def _unstacked(x: jax.Array, u: jax.Array, view: Matrices) -> jax.Array:
    order = (*view.stack, *view.rows, *view.columns)
    x = x.reshape([u.shape[dim] for dim in order])
    return x.transpose([order.index(dim) for dim in range(u.ndim)])


def _together(xs: list[jax.Array], ways: list[Route] | None, iterate: Iterate) -> list[jax.Array]:
    """One iteration over the matrices of several leaves."""
    counts = [x.shape[0] for x in xs]
    starts = [sum(counts[:k]) for k in range(len(counts))]
    total = sum(counts)
    if ways is None or not (ways[0].stack or ways[0].longer):
        y = iterate(jnp.concatenate(xs), ()).astype(xs[0].dtype)
        return [y[first : first + count] for first, count in zip(starts, counts, strict=True)]
    over = ways[0].over(ways[0].stack)
    slots = -(-total // over) * over
    if all(count % over == 0 for count in counts):  # no padding: one after the other
        moved = [_to_devices(x, way) for x, way in zip(xs, ways, strict=True)]
        y = _iterated(jnp.concatenate(moved), ways[0], slots, total, iterate)
        cuts = [first // over for first in starts[1:]]
        parts = jnp.split(y, cuts)
        return [_from_devices(part, way) for part, way in zip(parts, ways, strict=True)]
    # Each leaf in slots of its own, zeros in the others: the sum holds all.
    y = jnp.zeros(())
    for x, way, first in zip(xs, ways, starts, strict=True):
        after = slots - first - x.shape[0]
        y = y.astype(x.dtype) + _to_devices(jnp.pad(x, ((first, after), (0, 0), (0, 0))), way)
    y = _iterated(y, ways[0], slots, total, iterate)
    return [
        _from_devices(y, way)[first : first + count]
        for way, first, count in zip(ways, starts, counts, strict=True)
    ]


def _by_slices(x: jax.Array, way: Route | None, iterate: Iterate, each: int) -> jax.Array:
    """One leaf, `each` matrices a device at a time; the stack is padded with zeros."""
    count, over = x.shape[0], way.over(way.stack) if way else 1

    def one(x: jax.Array, real: int) -> jax.Array:
        if way is None:
            return iterate(x, ()).astype(x.dtype)
        return _from_devices(_iterated(_to_devices(x, way), way, x.shape[0], real, iterate), way)

    full = count // (each * over)
    rest = count - full * each * over
    parts = []
    if full:
        y = x[: count - rest].reshape(full, each * over, *x.shape[1:])
        # In place: compilers make a loop's new outputs, all zeros, before the step's first layer.
        put = lambda i, y: y.at[i].set(one(y[i], each * over))
        y = jax.lax.fori_loop(0, full, put, y)
        parts.append(y.reshape(count - rest, *x.shape[1:]))
    if rest:
        padded = jnp.pad(x[count - rest :], ((0, -rest % over), (0, 0), (0, 0)))
        parts.append(one(padded, rest)[:rest])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _iterated(x: jax.Array, way: Route, slots: int, real: int, iterate: Iterate) -> jax.Array:
    """The iteration on what a device holds; nothing where that is only padding."""
    run = lambda x: iterate(x, way.longer).astype(x.dtype)
    over = way.over(way.stack)
    # Devices that share a matrix must all take part in its sums.
    if way.longer or real > slots - slots // over:
        return run(x)
    first = jax.lax.axis_index(way.stack) * (slots // over)
    return jax.lax.cond(first < real, run, lambda x: x, x)


def _to_devices(x: jax.Array, way: Route) -> jax.Array:
    """Pieces of many matrices for few whole ones, or for their rows."""
    x = _to_stack(x, way)
    turned, free = _sides(way)
    if turned:
        x = jax.lax.all_to_all(x, turned, split_axis=1, concat_axis=2, tiled=True)
    if free:
        size = x.shape[1] // way.over(free)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(free) * size, size, axis=1)
    return x


def _from_devices(x: jax.Array, way: Route) -> jax.Array:
    """The way back."""
    turned, free = _sides(way)
    if free:
        x = jax.lax.all_gather(x, free, axis=1, tiled=True)
    if turned:
        x = jax.lax.all_to_all(x, turned, split_axis=2, concat_axis=1, tiled=True)
    return _from_stack(x, way)


def _sides(way: Route) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the axes that will split rows, those that split columns at rest, and those nothing."""
    turned = tuple(axis for axis in way.longer if axis in way.columns)
    return turned, tuple(axis for axis in way.longer if axis not in way.rows + way.columns)


def _moving(way: Route) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    """Size of each stack axis; those that exchange pieces; those that are free at rest."""
    sizes = [way.over((axis,)) for axis in way.stack]
    pieces = tuple(axis for axis in way.stack if axis in way.rows + way.columns)
    return sizes, pieces, tuple(axis for axis in way.stack if axis not in pieces)


def _to_stack(x: jax.Array, way: Route) -> jax.Array:
    """From [S, rows, columns] to [S / ways, more rows, more columns]."""
    sizes, pieces, free = _moving(way)
    x = x.reshape(*sizes, -1, *x.shape[-2:])
    for axis in reversed(free):
        at = way.stack.index(axis)
        x = jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(axis), at, keepdims=False)
    if not pieces:
        return x
    n = [way.over((axis,)) for axis in pieces]
    each, height, width = x.shape[-3:]
    x = _swap(x.reshape(-1, each, height, width), pieces)
    x = x.reshape(*n, each, height, width)
    rows = [dim for dim, axis in enumerate(pieces) if axis in way.rows]
    columns = [dim for dim, axis in enumerate(pieces) if axis in way.columns]
    k = len(pieces)
    x = x.transpose(k, *rows, k + 1, *columns, k + 2)
    return x.reshape(each, -1, math.prod(n[dim] for dim in columns) * width)


def _swap(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The k-th part of x goes to the k-th device along `axes`."""
    # XLA's CPU backend cuts x into parts, and refuses those that a transpose before it gave
    # unlike layouts.
    x = jax.lax.optimization_barrier(x)
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)


def _from_stack(x: jax.Array, way: Route) -> jax.Array:
    """The way back."""
    _, pieces, free = _moving(way)
    each = x.shape[0]
    if pieces:
        n = [way.over((axis,)) for axis in pieces]
        rows = [dim for dim, axis in enumerate(pieces) if axis in way.rows]
        columns = [dim for dim, axis in enumerate(pieces) if axis in way.columns]
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
    for axis in free:  # in the stack's order, so that all before it are there
        x = jax.lax.all_gather(x, axis, axis=way.stack.index(axis))
    return x.reshape(-1, height, width)
