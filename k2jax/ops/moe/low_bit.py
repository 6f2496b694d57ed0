"""Products of sorted rows with low-bit matrices, which are decoded a tile at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from k2jax.ops.collectives import Axes, all_gather, entry_axes
from k2jax.ops.lowbit import BLOCK, Int4, LowBit, decode, multiply_int4
from k2jax.ops.moe import low_bit_gpu as gpu
from k2jax.ops.moe.tiles import cut_into_tiles


def take_matrix(
    w: jax.Array | LowBit, index: tuple[jax.Array, ...], layout: P, dtype: jnp.dtype
) -> jax.Array:
    """One matrix of a stack, in `dtype`; `layout` is that of the matrix, where it is a part."""
    one = jax.tree.map(lambda a: a[index], w)
    return (decode(one, 1, layout) if isinstance(w, LowBit) else one).astype(dtype)


def gather_low_bit(w: LowBit, axes: Axes, dim: int) -> LowBit:
    """Gather a stack of matrices that mesh axes split along `dim`; FP8's scales are whole."""
    if isinstance(w, Int4):
        return jax.tree.map(lambda part: all_gather(part, axes, dim), w)
    return dataclasses.replace(w, code=all_gather(w.code, axes, dim))


def multiply_low_bit(
    x_MK: jax.Array, w: LowBit, first: jax.Array, size_E: jax.Array, layout: P
) -> jax.Array:
    """Multiply each row by the matrix of its group. Rows after the last group are undefined.

    Args:
        x_MK: rows, those of group 0 first.
        w: matrices [X, K, N].
        first: int32, matrix of group 0.
        size_E: int32, rows of each group.
        layout: of a matrix, where this device has a part of it.

    GPUs have kernels. Elsewhere XLA decodes a matrix inside of the product: FP8 as it is read, and
    INT4 in eight products, of the first values of all words, of the second, and so on.
    """
    kernels = {"default": functools.partial(_multiply_tiles, layout=layout)}
    if gpu.is_supported(w):
        kernels["cuda"] = functools.partial(_multiply_on_gpu, layout=layout)
    return jax.lax.platform_dependent(x_MK, w, first, size_E, **kernels)


def _multiply_on_gpu(x_MK, w: LowBit, first, size_E, *, layout: P):
    corner = [
        jax.lax.axis_index(names) * (n // BLOCK) if (names := entry_axes(entry)) else jnp.int32(0)
        for n, entry in zip(jax.tree.leaves(w)[0].shape[1:], (*layout, None, None), strict=False)
    ]
    return gpu.grouped_matmul(x_MK, w, first, size_E, jnp.stack(corner).astype(jnp.int32))


def _multiply_tiles(x_MK, w: LowBit, first, size_E, *, layout: P):
    """Compute `multiply_low_bit` by tiles; a group overwrites what the last wrote in its rows."""
    rows = _tile_rows(x_MK.shape[0], size_E.shape[0])
    most = x_MK.shape[0] // rows + size_E.shape[0]
    group_T, first_T, _ = cut_into_tiles(size_E, rows, most)
    x_MK = jnp.pad(x_MK, ((0, rows), (0, 0)))
    y_MN = jnp.zeros((x_MK.shape[0], jax.tree.leaves(w)[0].shape[-1]), x_MK.dtype)

    def multiply_tile(t, y_MN):
        x_GK = jax.lax.dynamic_slice_in_dim(x_MK, first_T[t], rows)
        one = jax.tree.map(lambda a: a[first + group_T[t]], w)
        if isinstance(one, Int4):
            y_GN = multiply_int4(x_GK, one)
        else:
            w_KN = decode(one, 1, layout).astype(x_GK.dtype)
            y_GN = jnp.dot(x_GK, w_KN, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_GN.astype(y_MN.dtype), first_T[t], 0)

    return jax.lax.fori_loop(0, (-(-size_E // rows)).sum(), multiply_tile, y_MN)[:-rows]


def _tile_rows(rows: int, groups: int) -> int:
    """Choose the rows of a tile: a group's average, so that few matrices are decoded twice."""
    return min(512, max(8, 1 << (rows // groups).bit_length()))
