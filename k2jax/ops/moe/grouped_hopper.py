"""Grouped products on Hopper GPUs: Pallas kernels that Mosaic compiles (`ops/mosaic.py`).

Each worker has half of a tile's rows. Copies begin at a multiple of a tile's rows, so a block of
rows that several groups share is multiplied for each of them, and each stores its own rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from k2jax.ops.moe.tiles import cut_into_blocks
from k2jax.ops.mosaic import WORKERS, is_chosen, make_kernel, plgpu, run_pipeline, worker

# A tile of the result; the contraction that a step multiplies, 128 bytes, as wide as shared memory
# is swizzled; steps under way. At most 192 KiB, and 32 KiB for the columns that are stored at once.
ROWS, COLUMNS, DEPTH, STAGES = 128, 256, 64, 4
SHARE = ROWS // WORKERS
STORED = 128
UNIT = 128  # of widths


def is_supported(dtype: Any, *widths: int) -> bool:
    """Whether the program is for Hopper, and its products take the dtype and widths."""
    fits = jnp.dtype(dtype).itemsize == 2 and all(width % UNIT == 0 for width in widths)
    return fits and is_chosen()


def grouped_matmul(
    x_MK: jax.Array,
    w: jax.Array,
    size_E: jax.Array,
    *,
    transposed: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """Multiply each row by the matrix of its group; 0 for rows of no group.

    Args:
        x_MK: rows, those of group 0 first.
        w: [E, K, N]; with `transposed` [E, N, K], read in that order.
        size_E: int32, rows of each group.
        transposed: the last dim of `w` is contracted.
        interpret: parameters of the interpreter, to run without a GPU.
    """
    length, wide = x_MK.shape[0], w.shape[1 if transposed else 2]
    x_MK = jnp.pad(x_MK, ((0, max(0, ROWS - length)), (0, 0)))  # an array is not below a tile
    columns = min(wide & -wide, COLUMNS)
    size_G = jnp.append(size_E, x_MK.shape[0] - size_E.sum()).astype(jnp.int32)
    tiles = pl.cdiv(x_MK.shape[0], ROWS) + size_E.size
    table = cut_into_blocks(size_G, ROWS, tiles)
    out = jax.ShapeDtypeStruct((x_MK.shape[0], wide), x_MK.dtype)
    body = functools.partial(_tile, columns, transposed)
    y_MN = _launch(body, tiles * (wide // columns), out, columns, interpret)(*table, x_MK, w)
    return y_MN[:length]


def _tile(columns, transposed, *refs):
    group_ref, block_ref, begin_ref, end_ref, x_ref, w_ref, y_ref, room_ref = refs
    across = y_ref.shape[1] // columns
    # Columns vary fastest: the programs that run at a time share their rows in the L2 cache.
    program = jax.lax.axis_index("program")
    tile, column = jax.lax.div(program, across), jax.lax.rem(program, across)
    group, block, begin, end = (ref[tile] for ref in (group_ref, block_ref, begin_ref, end_ref))
    steps = jnp.where(group < w_ref.shape[0], x_ref.shape[1] // DEPTH, 0)
    wide = pl.ds(column * columns, columns)

    def multiply(_, x_ref, w_ref, acc_ref):
        w = w_ref.transpose((1, 0)) if transposed else w_ref
        plgpu.wgmma(acc_ref, x_ref.at[_share()], w)
        plgpu.wgmma_wait(0)
        return acc_ref

    def store(acc):
        first = block * ROWS + worker() * SHARE
        rows = pl.ds(first, SHARE)
        _store_rows(acc, room_ref, y_ref.at[rows, wide], begin - first, end - first)

    x_spec = plgpu.BlockSpec((ROWS, DEPTH), lambda i: (block, i))
    if transposed:
        w_spec = plgpu.BlockSpec((columns, DEPTH), lambda i: (column, i))
    else:
        w_spec = plgpu.BlockSpec((DEPTH, columns), lambda i: (i, column))

    @pl.when(begin < end)  # tiles are as many as there can be; the last ones are often empty
    def _():
        inputs = (x_spec, x_ref), (w_spec, w_ref.at[group])
        _contract(multiply, store, steps, columns, inputs)


def grouped_outer(
    x_MK: jax.Array, dy_MN: jax.Array, size_E: jax.Array, *, interpret: Any = None
) -> jax.Array:
    """Sum `x^T dy` of each group, [E, K, N]; 0 for an empty one.

    Args:
        x_MK: rows, those of group 0 first.
        dy_MN: rows in the same order.
        size_E: int32, rows of each group.
        interpret: parameters of the interpreter, to run without a GPU.
    """
    (length, width), wide, groups = x_MK.shape, dy_MN.shape[1], size_E.size
    x_MK, dy_MN = (jnp.pad(a, ((0, max(0, DEPTH - length)), (0, 0))) for a in (x_MK, dy_MN))
    columns = min(wide & -wide, COLUMNS)
    end_E = jnp.cumsum(size_E, dtype=jnp.int32)
    programs = groups * (width // ROWS) * (wide // columns)
    out = jax.ShapeDtypeStruct((groups, width, wide), x_MK.dtype)
    body = functools.partial(_sum, columns)
    begin_E = end_E - size_E.astype(jnp.int32)
    return _launch(body, programs, out, columns, interpret)(begin_E, end_E, x_MK, dy_MN)


def _sum(columns, *refs):
    begin_ref, end_ref, x_ref, dy_ref, dw_ref, room_ref = refs
    _, width, wide = dw_ref.shape
    down, across = width // ROWS, wide // columns
    program = jax.lax.axis_index("program")
    group, tile = jax.lax.div(program, down * across), jax.lax.rem(program, down * across)
    row, column = jax.lax.div(tile, across), jax.lax.rem(tile, across)
    begin, end = begin_ref[group], end_ref[group]
    block = jax.lax.div(begin, DEPTH)
    steps = jnp.where(begin < end, pl.cdiv(end, DEPTH) - block, 0)

    def multiply(indices, x_ref, dy_ref, acc_ref):
        x_ref, first = x_ref.at[:, _share()], (block + indices[0]) * DEPTH

        @pl.when((first < begin) | (first + DEPTH > end))
        def _():  # rows of other groups
            at = first + jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, 0)
            at = plgpu.layout_cast(at, plgpu.Layout.WGMMA)
            x_ref[...] = jnp.where((at >= begin) & (at < end), x_ref[...], 0)
            plgpu.commit_smem()

        plgpu.wgmma(acc_ref, x_ref.transpose((1, 0)), dy_ref)
        plgpu.wgmma_wait(0)
        return acc_ref

    def store(acc):
        down = pl.ds(row * ROWS + worker() * SHARE, SHARE)
        dw_refs = dw_ref.at[group, down, pl.ds(column * columns, columns)]
        _store_rows(acc, room_ref, dw_refs, 0, SHARE)

    x_spec = plgpu.BlockSpec((DEPTH, ROWS), lambda i: (block + i, row))
    dy_spec = plgpu.BlockSpec((DEPTH, columns), lambda i: (block + i, column))
    _contract(multiply, store, steps, columns, ((x_spec, x_ref), (dy_spec, dy_ref)))


def _launch(
    body: functools.partial, programs: int, out: Any, columns: int, interpret: Any
) -> Callable:
    """Make a kernel; its body gets the inputs, the output, and room for columns to be stored."""
    room = plgpu.SMEM((WORKERS, SHARE, min(columns, STORED)), out.dtype)

    @functools.wraps(body.func)
    def run(*refs):
        pl.run_scoped(functools.partial(body, *refs), room, collective_axes="worker")

    return make_kernel(run, programs, out, interpret)


def _share() -> Any:
    """The part of a tile's rows that this worker has."""
    return pl.ds(worker() * SHARE, SHARE)


def _contract(multiply: Callable, store: Callable, steps, columns: int, inputs) -> None:
    """Add up the products of blocks, and store each worker's sum."""

    def work(run):
        def add_up(acc_ref):
            run(acc_ref)
            store(acc_ref[...])

        pl.run_scoped(add_up, plgpu.ACC((SHARE, columns), jnp.float32))

    run_pipeline(multiply, work, steps, inputs, STAGES)


def _store_rows(acc, room_ref, y_ref, begin, end) -> None:
    """Store a worker's rows from `begin` to `end`; copies have heights that the compiler knows."""
    room_ref = room_ref.at[worker()]
    columns = room_ref.shape[1]
    begin, end = jnp.clip(begin, 0, SHARE), jnp.clip(end, 0, SHARE)
    for start in range(0, y_ref.shape[1], columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        room_ref[...] = acc[:, start : start + columns].astype(room_ref.dtype)
        plgpu.commit_smem()
        done = begin
        for height in (SHARE, 8, 1):
            steps = jnp.maximum(end - done, 0) // height

            def copy(i, first, height=height, start=start):
                rows = pl.ds(first + i * height, height)
                y = y_ref.at[rows, pl.ds(start, columns)]
                plgpu.copy_smem_to_gmem(room_ref.at[rows], y)
                return first

            jax.lax.fori_loop(0, steps, copy, done)
            done += steps * height
    plgpu.wait_smem_to_gmem(0)
