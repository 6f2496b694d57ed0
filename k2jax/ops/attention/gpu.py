"""Causal attention on NVIDIA GPUs: Pallas kernels that Triton compiles (Hopper and Blackwell).

A program has a block of queries (or of keys) and goes through a range of blocks of the other side.
The ranges are a small table, made by ordinary operations and read by the kernel: blocks beyond the
diagonal, and blocks of other documents, are not read.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from k2jax.runtime import versions

triton: Any = versions.pallas_triton()
NEG_INF = -1e30  # below every logit; finite, so that differences are
LOG2E = math.log2(math.e)  # GPUs raise 2 to a power: in the kernels logits are in units of log 2
# Widths are multiples of the unit; gradients have room for these maxima, of one and of both.
WIDTH_UNIT, MAX_WIDTH, MAX_WIDTHS = 32, 192, 320
GPUS = ("9.0", "10.0")  # older ones have too few registers for these blocks


class BlockSizes(NamedTuple):
    """Queries and keys of a block, powers of two; how a program runs."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2  # of loads under way
    interpret: bool = False  # without a GPU


# By the compiler for an H100 at K2's widths nothing spills from registers; no GPU has timed them.
FORWARD, QUERY_GRADIENT, KEY_GRADIENT = (
    BlockSizes(128, 64),
    BlockSizes(128, 64),
    BlockSizes(32, 128),
)


class _Side(NamedTuple):
    """Queries or keys, padded to whole blocks."""

    arrays: list[jax.Array]  # [B, H, T, C] and [B, H, T]
    segment_BT: jax.Array
    block: int


def is_supported(q_BHTC: jax.Array, v_BHSV: jax.Array) -> bool:
    """Whether tensor cores take the dtype and widths, and the GPU, if any, runs the kernels."""
    if triton is None:
        return False
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability not in GPUS:
        return False
    widths = q_BHTC.shape[3], v_BHSV.shape[3]
    fit = all(n % WIDTH_UNIT == 0 and n <= MAX_WIDTH for n in widths) and sum(widths) <= MAX_WIDTHS
    return fit and q_BHTC.dtype.itemsize == 2


def forward(
    q_BHTC: jax.Array,
    k_BHSC: jax.Array,
    v_BHSV: jax.Array,
    segment_BT: jax.Array,
    *,
    scale: float,
    sizes: BlockSizes = FORWARD,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute `y_BHTV`; each query's largest logit and log of the sum of exponentials, [B, H, T].

    Args:
        q_BHTC: queries.
        k_BHSC: keys.
        v_BHSV: values.
        segment_BT: documents.
        scale: of the logits.
        sizes: blocks.
    """
    queries = _pad_side((q_BHTC,), segment_BT, sizes.queries)
    keys = _pad_side((k_BHSC, v_BHSV), segment_BT, sizes.keys)
    rows = queries.arrays[0].shape[:3]
    row = jax.ShapeDtypeStruct(rows, jnp.float32)
    y = jax.ShapeDtypeStruct((*rows, v_BHSV.shape[3]), v_BHSV.dtype)
    kernel = functools.partial(_attention, scale)
    outputs = _launch(kernel, sizes, queries, keys, (y, row, row), True)
    y, top, logsum = (a[:, :, : q_BHTC.shape[2]] for a in outputs)
    return y, top, logsum


def backward(
    saved,
    dy_BHTV: jax.Array,
    *,
    scale: float,
    sizes: tuple[BlockSizes, BlockSizes] = (QUERY_GRADIENT, KEY_GRADIENT),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values.

    Args:
        saved: the first four of `forward`, its `y_BHTV` and logs of sums.
        dy_BHTV: gradient of `y_BHTV`.
        scale: of the logits.
        sizes: blocks, for the gradient of queries and for the other two.
    """
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)
    queries, keys = (q_BHTC, dy_BHTV, logsum_BHT * LOG2E, mean_BHT), (k_BHSC, v_BHSV)

    def run(kernel, sizes, of_queries):
        sides = (
            _pad_side(queries, segment_BT, sizes.queries),
            _pad_side(keys, segment_BT, sizes.keys),
        )
        held, met = sides if of_queries else sides[::-1]
        likes = held.arrays[: 1 if of_queries else 2]
        out = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in likes]
        return _launch(functools.partial(kernel, scale), sizes, held, met, out, of_queries)

    outputs = *run(_attention_dq, sizes[0], True), *run(_attention_dkv, sizes[1], False)
    dq, dk, dv = (d[:, :, : a.shape[2]] for d, a in zip(outputs, saved[:3], strict=True))
    return dq, dk, dv


def _pad_side(arrays: Sequence[jax.Array], segment_BT: jax.Array, block: int):
    def pad(a: jax.Array, dim: int, mode: str) -> jax.Array:
        widths = [(0, -a.shape[dim] % block if d == dim else 0) for d in range(a.ndim)]
        return jnp.pad(a, widths, mode)

    # Keys of padding come after every query. Queries of padding are cut off, and have no gradient.
    # They belong to the last document, so that their block needs no further range.
    zeros = [pad(a, 2, "constant") for a in arrays]
    return _Side(zeros, pad(segment_BT, 1, "edge"), block)


def _block_ranges(held: _Side, met: _Side, of_queries: bool) -> jax.Array:
    """Table for the blocks of the side that is held, int32 [B, blocks, 3].

    Each has its first position, and the range [begin, end) of blocks of the other side to meet.
    """

    def ranges(side):
        blocks_BNT = side.segment_BT.reshape(side.segment_BT.shape[0], -1, side.block)
        at_N = side.block * jnp.arange(blocks_BNT.shape[1], dtype=jnp.int32)
        return blocks_BNT.min(axis=2), blocks_BNT.max(axis=2), at_N

    (low_BI, high_BI, at_I), (low_BJ, high_BJ, at_J) = ranges(held), ranges(met)
    overlap_BIJ = (low_BI[:, :, None] <= high_BJ[:, None]) & (
        low_BJ[:, None] <= high_BI[:, :, None]
    )
    if of_queries:
        seen_IJ = at_I[:, None] + held.block > at_J
    else:
        seen_IJ = at_J + met.block > at_I[:, None]
    meet_BIJ, j = overlap_BIJ & seen_IJ, jnp.arange(at_J.size, dtype=jnp.int32)
    begin_BI = jnp.where(meet_BIJ, j, j.size).min(axis=2)
    end_BI = jnp.where(meet_BIJ, j + 1, 0).max(axis=2)
    return jnp.stack(jnp.broadcast_arrays(at_I, begin_BI, end_BI), axis=-1)


def _launch(kernel, sizes: BlockSizes, held: _Side, met: _Side, out, of_queries: bool):
    """Run a kernel: a program for each block that is held, each head, each row of the batch."""
    table = _block_ranges(held, met, of_queries)
    batch, blocks, _ = table.shape

    def block(n):
        """The longest ranges first: those of the last queries, and of the first keys."""
        return blocks - 1 - n if of_queries else n

    def block_spec(a, side: int | None = None) -> pl.BlockSpec:
        """A block along T, or all, of [B, T], [B, H, T] or [B, H, T, C]."""
        dim = min(a.ndim - 1, 2)
        shape = (*[None] * dim, side or a.shape[dim], *a.shape[dim + 1 :])

        def index(n, head, row):
            return *(row, head)[:dim], block(n) if side else 0, *[0] * (a.ndim - dim - 1)

        return pl.BlockSpec(shape, index)

    held_specs = [block_spec(a, held.block) for a in (held.segment_BT, *held.arrays)]
    met_specs = [block_spec(a) for a in (met.segment_BT, *met.arrays)]
    table_spec = pl.BlockSpec((None, None, 3), lambda n, head, row: (row, block(n), 0))
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        out_shape=out,
        grid=(blocks, held.arrays[0].shape[1], batch),
        in_specs=[table_spec, *held_specs, *met_specs],
        out_specs=[block_spec(a, held.block) for a in out],
        compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=sizes.interpret,
    )(table, held.segment_BT, *held.arrays, met.segment_BT, *met.arrays)


def _attention(scale, sizes, *refs):
    """Attention of a block of queries: softmax sums are carried along the keys."""
    table_ref, segment_T_ref, q_ref, segment_S_ref, k_ref, v_ref, y_ref, top_ref, logsum_ref = refs
    is_seen = _make_mask(table_ref, segment_T_ref, segment_S_ref, sizes.keys, operator.ge)
    q = _read(q_ref)

    def meet(j, carry):
        y, top_T, sum_T = carry
        at = pl.ds(j * sizes.keys, sizes.keys)
        logit_TS = _product(q, _read(k_ref, at)) * (scale * LOG2E)
        logit_TS = jnp.where(is_seen(j), logit_TS, -jnp.inf)
        new_T = jnp.maximum(top_T, logit_TS.max(axis=1))
        weight_TS, rescale_T = jnp.exp2(logit_TS - new_T[:, None]), jnp.exp2(top_T - new_T)
        y = _add_product([a * rescale_T[:, None] for a in y], weight_TS, _read(v_ref, at))
        return y, new_T, sum_T * rescale_T + weight_TS.sum(axis=1)

    row = jnp.zeros(sizes.queries, jnp.float32)
    start = (_zeros(y_ref), row + NEG_INF, row)
    y, top_T, sum_T = jax.lax.fori_loop(table_ref[1], table_ref[2], meet, start)
    _write(y_ref, [a / sum_T[:, None] for a in y])
    top_ref[...] = top_T / LOG2E
    logsum_ref[...] = (top_T + jnp.log2(sum_T)) / LOG2E


def _attention_dq(scale, sizes, *refs):
    """Gradient of a block of queries; weights are recomputed from the logs of their sums."""
    table_ref, segment_T_ref, q_ref, dy_ref, logsum_ref, mean_ref, *refs = refs
    segment_S_ref, k_ref, v_ref, dq_ref = refs
    is_seen = _make_mask(table_ref, segment_T_ref, segment_S_ref, sizes.keys, operator.ge)
    q, dy, logsum_T, mean_T = _read(q_ref), _read(dy_ref), logsum_ref[...], mean_ref[...]

    def meet(j, dq):
        at = pl.ds(j * sizes.keys, sizes.keys)
        k = _read(k_ref, at)
        logit_TS = _product(q, k) * (scale * LOG2E)
        weight_TS = jnp.where(is_seen(j), jnp.exp2(logit_TS - logsum_T[:, None]), 0.0)
        dweight_TS = _product(dy, _read(v_ref, at)) - mean_T[:, None]
        return _add_product(dq, weight_TS * dweight_TS, k)

    dq = jax.lax.fori_loop(table_ref[1], table_ref[2], meet, _zeros(q_ref))
    _write(dq_ref, [a * scale for a in dq])


def _attention_dkv(scale, sizes, *refs):
    """Gradients of a block of keys and values."""
    table_ref, segment_S_ref, k_ref, v_ref, *refs = refs
    segment_T_ref, q_ref, dy_ref, logsum_ref, mean_ref, dk_ref, dv_ref = refs
    is_seen = _make_mask(table_ref, segment_S_ref, segment_T_ref, sizes.queries, operator.le)
    k, v = _read(k_ref), _read(v_ref)

    def meet(i, carry):
        dk, dv = carry
        at = pl.ds(i * sizes.queries, sizes.queries)
        q, dy = _read(q_ref, at), _read(dy_ref, at)
        logit_ST = _product(k, q) * (scale * LOG2E)
        weight_ST = jnp.where(is_seen(i), jnp.exp2(logit_ST - logsum_ref[at][None]), 0.0)
        dv = _add_product(dv, weight_ST, dy)
        dweight_ST = _product(v, dy) - mean_ref[at][None]
        return _add_product(dk, weight_ST * dweight_ST, q), dv

    start = _zeros(k_ref), _zeros(v_ref)
    dk, dv = jax.lax.fori_loop(table_ref[1], table_ref[2], meet, start)
    _write(dk_ref, [a * scale for a in dk])
    _write(dv_ref, dv)


def _make_mask(table_ref, held_ref, met_ref, side: int, order: Callable) -> Callable:
    """Make a predicate: which positions of the block held and of block `j` see each other."""
    held, position = held_ref[...], table_ref[0] + jnp.arange(held_ref.shape[0])

    def is_seen(j):
        met = met_ref[pl.ds(j * side, side)]
        other = j * side + jnp.arange(side)
        return (held[:, None] == met[None]) & order(position[:, None], other[None])

    return is_seen


# A block of a width like 192, which is no power of two, is a tuple: 128 and 64.


def _parts(width: int) -> list:
    """Split a width into powers of two, as slices."""
    sizes = [1 << n for n in reversed(range(width.bit_length())) if width >> n & 1]
    return [pl.ds(sum(sizes[:n]), size) for n, size in enumerate(sizes)]


def _read(ref, at=slice(None)) -> tuple[jax.Array, ...]:
    return tuple(ref[at, part] for part in _parts(ref.shape[1]))


def _write(ref, block) -> None:
    for part, a in zip(_parts(ref.shape[1]), block, strict=True):
        ref[:, part] = a.astype(ref.dtype)


def _zeros(ref) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((ref.shape[0], part.size), jnp.float32) for part in _parts(ref.shape[1]))


def _product(a, b) -> jax.Array:
    """`a b^T`."""
    return functools.reduce(operator.add, (_dot(x, y.T) for x, y in zip(a, b, strict=True)))


def _add_product(sums, weight: jax.Array, block) -> tuple[jax.Array, ...]:
    """Add `weight block` to the sums; weights are cast to the block's dtype."""
    return tuple(s + _dot(weight.astype(a.dtype), a) for s, a in zip(sums, block, strict=True))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in float32; float32 operands are not shortened to TF32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=highest, preferred_element_type=jnp.float32)
