"""Grouped products on NVIDIA GPUs: Pallas kernels that Triton compiles (Ampere and later).

On Hopper `grouped_hopper.py` comes first; these serve widths that it does not take.

Rows are cut into tiles of one group each, so that the cost of a group is proportional to its rows.
The tiles are a small table, made by ordinary operations and read by the kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from k2jax.ops.moe.tiles import cut_into_tiles
from k2jax.runtime import versions

triton: Any = versions.pallas_triton()

# The most rows and columns of a tile, and bytes of the contraction in fast memory at a time: three
# stages of it are 144 KiB, which Ampere, Hopper and Blackwell grant a kernel.
ROWS, COLUMNS, DEPTH = 128, 256, 128
MIN_WIDTH = 16  # of a product by tensor cores
PARAMS = {"num_warps": 8, "num_stages": 3}


class BlockSizes(NamedTuple):
    """How much of each dim a program holds."""

    rows: int
    columns: int
    depth: int  # of the contraction


def is_supported(*widths: int) -> bool:
    """Whether tiles divide the widths, and the GPU, if any, runs the kernels."""
    if triton is None:
        return False
    if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
        return False
    return all(width % MIN_WIDTH == 0 for width in widths)


def _divisor(width: int, most: int) -> int:
    """The largest power of two up to `most` that divides the width."""
    return min(width & -width, most)


def grouped_matmul(
    x_MK: jax.Array,
    w: jax.Array,
    size_E: jax.Array,
    *,
    first: jax.Array | int = 0,
    transposed: bool = False,
    rows: int = ROWS,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each row by the matrix of its group; 0 for rows of no group.

    Args:
        x_MK: rows, those of group 0 first.
        w: [E, K, N]; with `transposed` [E, N, K], read in that order.
        size_E: int32, rows of each group.
        first: of the matrices in `w`, if it has more than the groups.
        transposed: the last dim of `w` is contracted.
        rows: of a tile.
        interpret: run without a GPU.
    """
    length, width = x_MK.shape
    wide = w.shape[1 if transposed else 2]
    columns, depth = _divisor(wide, COLUMNS), _divisor(width, DEPTH // x_MK.dtype.itemsize)
    tiles = pl.cdiv(length, rows) + size_E.shape[0] + 1
    tile_spec = pl.BlockSpec((None,), lambda column, tile: (tile,))
    # Columns vary fastest: the programs that run at a time share their rows in the L2 cache.
    return pl.pallas_call(
        functools.partial(_tile, BlockSizes(rows, columns, depth), transposed),
        out_shape=jax.ShapeDtypeStruct((length, wide), x_MK.dtype),
        grid=(wide // columns, tiles),
        in_specs=[tile_spec] * 3 + [pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        compiler_params=triton.CompilerParams(**PARAMS),
        interpret=interpret,
    )(*_place_groups(_tiles(size_E, length, rows, tiles), size_E, first, w), x_MK, w)


def _tiles(size_E: jax.Array, length: int, rows: int, tiles: int) -> tuple[jax.Array, ...]:
    """Cut the groups into tiles; rows of no group are one more group."""
    size_G = jnp.append(size_E, length - size_E.sum()).astype(jnp.int32)
    return cut_into_tiles(size_G, rows, tiles)


def _place_groups(tiles, size_E: jax.Array, first: jax.Array | int, w: jax.Array):
    """Number the groups as the matrices are; rows of no group get a number after the last."""
    group, *ends = tiles
    return jnp.where(group < size_E.shape[0], group + first, w.shape[0]).astype(jnp.int32), *ends


def _tile(sizes: BlockSizes, transposed: bool, *refs):
    *tile_refs, x_ref, w_ref, y_ref = refs
    group, first, end = (ref[...] for ref in tile_refs)
    rows, columns, depth = sizes
    steps = x_ref.shape[1] // depth * (group < w_ref.shape[0]).astype(jnp.int32)
    at, own = pl.ds(first, rows), (first + jnp.arange(rows) < end)[:, None]
    across = pl.ds(pl.program_id(0) * columns, columns)

    def more(i, acc):
        along = pl.ds(i * depth, depth)
        x = triton.load(x_ref.at[at, along], mask=own, other=0.0)
        if transposed:
            w = triton.load(w_ref.at[group, across, along]).T
        else:
            w = triton.load(w_ref.at[group, along, across])
        return acc + _dot(x, w)

    @pl.when(first < end)  # tiles are as many as there can be; the last ones are often empty
    def _():
        acc = jax.lax.fori_loop(0, steps, more, jnp.zeros((rows, columns), jnp.float32))
        triton.store(y_ref.at[at, across], acc.astype(y_ref.dtype), mask=own)


def grouped_outer(
    x_MK: jax.Array, dy_MN: jax.Array, size_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Sum `x^T dy` of each group, [E, K, N]; 0 for an empty one.

    Args:
        x_MK: rows, those of group 0 first.
        dy_MN: rows in the same order.
        size_E: int32, rows of each group.
        interpret: run without a GPU.
    """
    width, wide = x_MK.shape[1], dy_MN.shape[1]
    rows, columns, depth = _divisor(width, ROWS), _divisor(wide, COLUMNS), DEPTH // x_MK.itemsize
    end_E = jnp.cumsum(size_E, dtype=jnp.int32)
    group_spec = pl.BlockSpec((None,), lambda column, row, group: (group,))
    tile = pl.BlockSpec((None, rows, columns), lambda column, row, group: (group, row, column))
    return pl.pallas_call(
        functools.partial(_sum, BlockSizes(rows, columns, depth)),
        out_shape=jax.ShapeDtypeStruct((size_E.shape[0], width, wide), x_MK.dtype),
        grid=(wide // columns, width // rows, size_E.shape[0]),
        in_specs=[group_spec] * 2 + [pl.no_block_spec] * 2,
        out_specs=tile,
        compiler_params=triton.CompilerParams(**PARAMS),
        interpret=interpret,
    )(end_E - size_E, end_E, x_MK, dy_MN)


def _sum(sizes: BlockSizes, *refs):
    first_ref, end_ref, x_ref, dy_ref, dw_ref = refs
    first, end = first_ref[...], end_ref[...]
    rows, columns, depth = sizes
    across = pl.ds(pl.program_id(0) * columns, columns)
    down = pl.ds(pl.program_id(1) * rows, rows)

    def more(i, acc):
        begin = first + i * depth
        at, own = pl.ds(begin, depth), (begin + jnp.arange(depth) < end)[:, None]
        x = triton.load(x_ref.at[at, down], mask=own, other=0.0)
        dy = triton.load(dy_ref.at[at, across], mask=own, other=0.0)
        return acc + _dot(x.T, dy)

    steps = pl.cdiv(end - first, depth)
    acc = jax.lax.fori_loop(0, steps, more, jnp.zeros((rows, columns), jnp.float32))
    dw_ref[...] = acc.astype(dw_ref.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in float32; float32 operands are not shortened to TF32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=highest, preferred_element_type=jnp.float32)
