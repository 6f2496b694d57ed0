"""Causal attention on NVIDIA GPUs: Pallas kernels that Triton compiles (Hopper and Blackwell).

A program has a block of queries (or of keys) and goes through the blocks that it may meet. Which
those are is a small table, made by ordinary operations and read by the kernel: what the diagonal
hides is not visited, nor are blocks of other documents.
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
NONE = -1e30  # below every logit; finite, so that differences are
LOG2E = math.log2(math.e)  # GPUs raise 2 to a power: in the kernels logits are in units of log 2
# Widths are multiples of this; the most, and the most of both, that gradients have room for.
PART, MOST, BOTH = 32, 192, 320
GPUS = ("9.0", "10.0")  # older ones have too few registers for these blocks


class Cut(NamedTuple):
    """How many queries and keys meet at a time, powers of two; how a program runs."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2  # of loads under way
    interpret: bool = False  # without a GPU


# By the compiler for an H100 at K2's widths nothing spills from registers; no GPU has timed them.
FORWARD, OF_QUERIES, OF_KEYS = Cut(128, 64), Cut(128, 64), Cut(32, 128)


class _Side(NamedTuple):
    """Queries or keys, padded to whole blocks."""

    arrays: list[jax.Array]  # [B, H, T, C] and [B, H, T]
    segment_BT: jax.Array
    block: int


def usable(q_BHTC: jax.Array, v_BHSV: jax.Array) -> bool:
    """Whether tensor cores take the dtype and widths, and the GPU, if there is one, the kernels."""
    if triton is None:
        return False
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability not in GPUS:
        return False
    widths = q_BHTC.shape[3], v_BHSV.shape[3]
    fit = all(n % PART == 0 and n <= MOST for n in widths) and sum(widths) <= BOTH
    return fit and q_BHTC.dtype.itemsize == 2


def forward(
    q_BHTC: jax.Array, k_BHSC: jax.Array, v_BHSV: jax.Array, segment_BT: jax.Array,
    *, scale: float, cut: Cut = FORWARD,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`y_BHTV`; of each query the largest logit and the log of the sum of exponentials, [B, H, T].

    Args:
        q_BHTC: queries.
        k_BHSC: keys.
        v_BHSV: values.
        segment_BT: documents.
        scale: of the logits.
        cut: blocks.
    """
    queries = _side((q_BHTC,), segment_BT, cut.queries)
    keys = _side((k_BHSC, v_BHSV), segment_BT, cut.keys)
    rows = queries.arrays[0].shape[:3]
    row = jax.ShapeDtypeStruct(rows, jnp.float32)
    y = jax.ShapeDtypeStruct((*rows, v_BHSV.shape[3]), v_BHSV.dtype)
    kernel = functools.partial(_attention, scale)
    found = _launch(kernel, cut, queries, keys, (y, row, row), True)
    y, top, logsum = (a[:, :, : q_BHTC.shape[2]] for a in found)
    return y, top, logsum


def backward(
    saved, dy_BHTV: jax.Array, *, scale: float, cuts: tuple[Cut, Cut] = (OF_QUERIES, OF_KEYS)
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values.

    Args:
        saved: the first four of `forward`, its `y_BHTV` and logs of sums.
        dy_BHTV: of the values mixed.
        scale: of the logits.
        cuts: blocks, for the gradient of queries and for the other two.
    """
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)
    queries, keys = (q_BHTC, dy_BHTV, logsum_BHT * LOG2E, mean_BHT), (k_BHSC, v_BHSV)

    def run(kernel, cut, of_queries):
        sides = _side(queries, segment_BT, cut.queries), _side(keys, segment_BT, cut.keys)
        held, met = sides if of_queries else sides[::-1]
        likes = held.arrays[: 1 if of_queries else 2]
        out = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in likes]
        return _launch(functools.partial(kernel, scale), cut, held, met, out, of_queries)

    found = *run(_attention_dq, cuts[0], True), *run(_attention_dkv, cuts[1], False)
    dq, dk, dv = (d[:, :, : a.shape[2]] for d, a in zip(found, saved[:3], strict=True))
    return dq, dk, dv


def _side(arrays: Sequence[jax.Array], segment_BT: jax.Array, block: int):
    def padded(a: jax.Array, dim: int, mode: str) -> jax.Array:
        widths = [(0, -a.shape[dim] % block if d == dim else 0) for d in range(a.ndim)]
        return jnp.pad(a, widths, mode)

    # Keys of padding come after every query. Queries of padding are cut off, and bring no gradient.
    # They belong to the last document, so that their block meets no other for their sake.
    zeros = [padded(a, 2, "constant") for a in arrays]
    return _Side(zeros, padded(segment_BT, 1, "edge"), block)


def _table(held: _Side, met: _Side, of_queries: bool) -> jax.Array:
    """For each block of what is held, int32 [B, blocks, 3].

    Its first position; the first block to meet, and the end of them.
    """

    def ranges(side):
        blocks_BNT = side.segment_BT.reshape(side.segment_BT.shape[0], -1, side.block)
        at_N = side.block * jnp.arange(blocks_BNT.shape[1], dtype=jnp.int32)
        return blocks_BNT.min(axis=2), blocks_BNT.max(axis=2), at_N

    (low_BI, high_BI, at_I), (low_BJ, high_BJ, at_J) = ranges(held), ranges(met)
    alike_BIJ = (low_BI[:, :, None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BI[:, :, None])
    if of_queries:
        seen_IJ = at_I[:, None] + held.block > at_J
    else:
        seen_IJ = at_J + met.block > at_I[:, None]
    meet_BIJ, j = alike_BIJ & seen_IJ, jnp.arange(at_J.size, dtype=jnp.int32)
    begin_BI = jnp.where(meet_BIJ, j, j.size).min(axis=2)
    end_BI = jnp.where(meet_BIJ, j + 1, 0).max(axis=2)
    return jnp.stack(jnp.broadcast_arrays(at_I, begin_BI, end_BI), axis=-1)


def _launch(kernel, cut: Cut, held: _Side, met: _Side, out, of_queries: bool):
    """Run a kernel: a program for each block of what is held, each head, each row of the batch."""
    table = _table(held, met, of_queries)
    batch, blocks, _ = table.shape
    # The longest walks first: those of the last queries, and of the first keys.
    block = (lambda n: blocks - 1 - n) if of_queries else (lambda n: n)

    def cut_of(a, side: int | None = None) -> pl.BlockSpec:
        """A block along T, or all, of [B, T], [B, H, T] or [B, H, T, C]."""
        dim = min(a.ndim - 1, 2)
        shape = (*[None] * dim, side or a.shape[dim], *a.shape[dim + 1 :])

        def index(n, head, row):
            return *(row, head)[:dim], block(n) if side else 0, *[0] * (a.ndim - dim - 1)

        return pl.BlockSpec(shape, index)

    own = lambda arrays: [cut_of(a, held.block) for a in arrays]
    whole = [cut_of(a) for a in (met.segment_BT, *met.arrays)]
    of_table = pl.BlockSpec((None, None, 3), lambda n, head, row: (row, block(n), 0))
    return pl.pallas_call(
        functools.partial(kernel, cut),
        out_shape=out,
        grid=(blocks, held.arrays[0].shape[1], batch),
        in_specs=[of_table, *own([held.segment_BT, *held.arrays]), *whole],
        out_specs=own(out),
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=cut.interpret,
    )(table, held.segment_BT, *held.arrays, met.segment_BT, *met.arrays)


def _attention(scale, cut, *refs):
    """A block of queries and the keys that it meets: softmax sums are carried along."""
    table_ref, segment_T_ref, q_ref, segment_S_ref, k_ref, v_ref, y_ref, top_ref, logsum_ref = refs
    seen = _seen(table_ref, segment_T_ref, segment_S_ref, cut.keys, operator.ge)
    q = _read(q_ref)

    def meet(j, carry):
        y, top_T, sum_T = carry
        at = pl.ds(j * cut.keys, cut.keys)
        logit_TS = _product(q, _read(k_ref, at)) * (scale * LOG2E)
        logit_TS = jnp.where(seen(j), logit_TS, -jnp.inf)
        new_T = jnp.maximum(top_T, logit_TS.max(axis=1))
        weight_TS, shrink_T = jnp.exp2(logit_TS - new_T[:, None]), jnp.exp2(top_T - new_T)
        y = _added([a * shrink_T[:, None] for a in y], weight_TS, _read(v_ref, at))
        return y, new_T, sum_T * shrink_T + weight_TS.sum(axis=1)

    row = jnp.zeros(cut.queries, jnp.float32)
    start = (_nothing(y_ref), row + NONE, row)
    y, top_T, sum_T = jax.lax.fori_loop(table_ref[1], table_ref[2], meet, start)
    _write(y_ref, [a / sum_T[:, None] for a in y])
    top_ref[...] = top_T / LOG2E
    logsum_ref[...] = (top_T + jnp.log2(sum_T)) / LOG2E


def _attention_dq(scale, cut, *refs):
    """A block of queries again, weights made again from the logs of their sums."""
    table_ref, segment_T_ref, q_ref, dy_ref, logsum_ref, mean_ref, *refs = refs
    segment_S_ref, k_ref, v_ref, dq_ref = refs
    seen = _seen(table_ref, segment_T_ref, segment_S_ref, cut.keys, operator.ge)
    q, dy, logsum_T, mean_T = _read(q_ref), _read(dy_ref), logsum_ref[...], mean_ref[...]

    def meet(j, dq):
        at = pl.ds(j * cut.keys, cut.keys)
        k = _read(k_ref, at)
        logit_TS = _product(q, k) * (scale * LOG2E)
        weight_TS = jnp.where(seen(j), jnp.exp2(logit_TS - logsum_T[:, None]), 0.0)
        dweight_TS = _product(dy, _read(v_ref, at)) - mean_T[:, None]
        return _added(dq, weight_TS * dweight_TS, k)

    dq = jax.lax.fori_loop(table_ref[1], table_ref[2], meet, _nothing(q_ref))
    _write(dq_ref, [a * scale for a in dq])


def _attention_dkv(scale, cut, *refs):
    """A block of keys and values, and the queries that it meets."""
    table_ref, segment_S_ref, k_ref, v_ref, *refs = refs
    segment_T_ref, q_ref, dy_ref, logsum_ref, mean_ref, dk_ref, dv_ref = refs
    seen = _seen(table_ref, segment_S_ref, segment_T_ref, cut.queries, operator.le)
    k, v = _read(k_ref), _read(v_ref)

    def meet(i, carry):
        dk, dv = carry
        at = pl.ds(i * cut.queries, cut.queries)
        q, dy = _read(q_ref, at), _read(dy_ref, at)
        logit_ST = _product(k, q) * (scale * LOG2E)
        weight_ST = jnp.where(seen(i), jnp.exp2(logit_ST - logsum_ref[at][None]), 0.0)
        dv = _added(dv, weight_ST, dy)
        dweight_ST = _product(v, dy) - mean_ref[at][None]
        return _added(dk, weight_ST * dweight_ST, q), dv

    start = _nothing(k_ref), _nothing(v_ref)
    dk, dv = jax.lax.fori_loop(table_ref[1], table_ref[2], meet, start)
    _write(dk_ref, [a * scale for a in dk])
    _write(dv_ref, dv)


def _seen(table_ref, held_ref, met_ref, side: int, order: Callable) -> Callable:
    """Which pairs of what is held and of block `j` of what is met see each other."""
    held, position = held_ref[...], table_ref[0] + jnp.arange(held_ref.shape[0])

    def of(j):
        met = met_ref[pl.ds(j * side, side)]
        other = j * side + jnp.arange(side)
        return (held[:, None] == met[None]) & order(position[:, None], other[None])

    return of


# A block of a width like 192, which is no power of two, is a tuple: 128 and 64.


def _parts(width: int) -> list:
    """Powers of two that a width is made of, as slices."""
    sizes = [1 << n for n in reversed(range(width.bit_length())) if width >> n & 1]
    return [pl.ds(sum(sizes[:n]), size) for n, size in enumerate(sizes)]


def _read(ref, at=slice(None)) -> tuple[jax.Array, ...]:
    return tuple(ref[at, part] for part in _parts(ref.shape[1]))


def _write(ref, block) -> None:
    for part, a in zip(_parts(ref.shape[1]), block, strict=True):
        ref[:, part] = a.astype(ref.dtype)


def _nothing(ref) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((ref.shape[0], part.size), jnp.float32) for part in _parts(ref.shape[1]))


def _product(a, b) -> jax.Array:
    """`a b^T`."""
    return functools.reduce(operator.add, (_dot(x, y.T) for x, y in zip(a, b, strict=True)))


def _added(sums, weight: jax.Array, block) -> tuple[jax.Array, ...]:
    """The sums and `weight block`; weights meet the block in its dtype."""
    return tuple(s + _dot(weight.astype(a.dtype), a) for s, a in zip(sums, block, strict=True))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """In float32; float32 operands are not shortened to TF32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.dot(a, b, precision=highest, preferred_element_type=jnp.float32)
