"""Grouped products with low-bit matrices on NVIDIA GPUs: Triton kernels that decode tile by tile.

As `grouped_gpu`, with the values of `ops.lowbit`. Codes are read once for each tile of rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from k2jax.ops.lowbit import BLOCK, GROUP, PER_WORD, Int4, LowBit, group_inputs
from k2jax.ops.moe.grouped_gpu import _divisor, _dot, _place_groups, _tiles, triton
from k2jax.ops.moe.grouped_gpu import is_supported as runs_kernels

ROWS, COLUMNS = 64, 128
WORDS = 16  # rows of words at a time, which is the least depth of a product by tensor cores
DEPTH = 64  # rows of FP8 at a time
PARAMS = {"num_warps": 4, "num_stages": 3}


def is_supported(w: LowBit) -> bool:
    """Whether tiles divide the matrices, and the GPU, if any, runs the kernels."""
    if isinstance(w, Int4):
        depth, wide = w.word.shape[-2:]
        return runs_kernels(wide) and depth % WORDS == 0
    return runs_kernels(*w.code.shape[-2:]) and all(n % BLOCK == 0 for n in w.code.shape[-2:])


def grouped_matmul(
    x_MK: jax.Array,
    w: LowBit,
    first: jax.Array,
    size_E: jax.Array,
    corner: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each row by the matrix of its group; 0 for rows of no group.

    Args:
        x_MK: rows, those of group 0 first.
        w: matrices [X, K, N].
        first: of them, int32.
        size_E: int32, rows of each group.
        corner: int32, block row and column of FP8's scales in which this device's part begins.
        interpret: run without a GPU.
    """
    length = x_MK.shape[0]
    codes, scale = jax.tree.leaves(w)
    wide = codes.shape[-1]
    columns = _divisor(wide, COLUMNS)
    tiles = pl.cdiv(length, ROWS) + size_E.shape[0] + 1
    tile_spec = pl.BlockSpec((None,), lambda column, tile: (tile,))
    if isinstance(w, Int4):
        kernel, x_MK = _int4_tile, group_inputs(x_MK).reshape(x_MK.shape)
    else:
        kernel = _fp8_tile
    table = _place_groups(_tiles(size_E, length, ROWS, tiles), size_E, first, codes)
    return pl.pallas_call(
        functools.partial(kernel, columns),
        out_shape=jax.ShapeDtypeStruct((length, wide), x_MK.dtype),
        grid=(wide // columns, tiles),
        in_specs=[tile_spec] * 3 + [pl.no_block_spec] * 4,
        out_specs=pl.no_block_spec,
        compiler_params=triton.CompilerParams(**PARAMS),
        interpret=interpret,
    )(*table, corner, x_MK, codes, scale)


def _int4_tile(columns: int, *refs):
    *tile_refs, _, x_ref, word_ref, scale_ref, y_ref = refs
    group, first, end = (ref[...] for ref in tile_refs)
    depth = word_ref.shape[1]  # words of a column; x has the first inputs of all words first
    at, own = pl.ds(first, ROWS), (first + jnp.arange(ROWS) < end)[:, None]
    across = pl.ds(pl.program_id(0) * columns, columns)
    words = GROUP // PER_WORD

    def more(i, acc):
        word = triton.load(word_ref.at[group, pl.ds(i * WORDS, WORDS), across])
        scales = WORDS // words
        scale = triton.load(scale_ref.at[group, pl.ds(i * scales, scales), across])
        scale = jnp.broadcast_to(scale[:, None].astype(jnp.float32), (scales, words, columns))
        scale = scale.reshape(WORDS, columns)
        for n in range(PER_WORD):
            x = triton.load(x_ref.at[at, pl.ds(n * depth + i * WORDS, WORDS)], mask=own, other=0.0)
            value = (((word >> (4 * n)) & 15) - 8).astype(jnp.float32) * scale
            acc += _dot(x, value.astype(jnp.bfloat16).astype(x.dtype))
        return acc

    _run(more, depth // WORDS, (group, word_ref.shape[0]), (first, end), (at, own, across), y_ref)


def _fp8_tile(columns: int, *refs):
    *tile_refs, corner_ref, x_ref, code_ref, scale_ref, y_ref = refs
    group, first, end = (ref[...] for ref in tile_refs)
    at, own = pl.ds(first, ROWS), (first + jnp.arange(ROWS) < end)[:, None]
    across = pl.ds(pl.program_id(0) * columns, columns)
    column = corner_ref[1] + pl.program_id(0) * columns // BLOCK
    row = corner_ref[0]

    def more(i, acc):
        along = pl.ds(i * DEPTH, DEPTH)
        x = triton.load(x_ref.at[at, along], mask=own, other=0.0)
        code = triton.load(code_ref.at[group, along, across])
        scale = scale_ref[group, row + i * DEPTH // BLOCK, column]
        value = code.astype(jnp.float32) * scale
        return acc + _dot(x, value.astype(jnp.bfloat16).astype(x.dtype))

    steps = x_ref.shape[1] // DEPTH
    _run(more, steps, (group, code_ref.shape[0]), (first, end), (at, own, across), y_ref)


def _run(more, steps: int, group, rows, place, y_ref) -> None:
    """Sum over the contraction, and store the tile; rows of no group are 0."""
    (number, groups), (first, end), (at, own, across) = group, rows, place
    count = steps * (number < groups).astype(jnp.int32)

    @pl.when(first < end)  # tiles are as many as there can be; the last ones are often empty
    def _():
        start = jnp.zeros((ROWS, across.size), jnp.float32)
        acc = jax.lax.fori_loop(0, count, more, start)
        triton.store(y_ref.at[at, across], acc.astype(y_ref.dtype), mask=own)
