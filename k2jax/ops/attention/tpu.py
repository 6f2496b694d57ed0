"""Causal attention on TPUs: Pallas kernels.

Only blocks of queries and keys that see each other meet (`ops/visits.py`). There keys are rows and
queries are columns: what belongs to a query (its largest logit, the sum of its weights) is then one
row, and is found without crossing lanes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from k2jax.ops.attention.block_pairs import ALL, BEGIN, END, SOME, kinds, visits

NONE = -1e30  # below every product; finite, so that differences are
SCALARS = 4  # the columns of the table
LOG2E = math.log2(math.e)  # TPUs raise 2 to a power, not e


class Sizes(NamedTuple):
    """Queries, and keys, of a block: what fits the 16 MiB that the compiler grants a kernel."""

    least: int = 512  # lengths are padded to a multiple of it
    most: int = 1024  # a block, where it divides the padded length
    part: int = 256  # keys whose logits are there at a time

    def block(self, length: int) -> int:
        """For a length."""
        return math.gcd(length + -length % self.least, self.most)


class Way(NamedTuple):
    """What a kernel is compiled for."""

    scale: float  # of the logits
    sizes: Sizes = Sizes()
    interpret: bool = False  # run it without a TPU


class _Step(NamedTuple):
    """What a kernel knows of its blocks."""

    scale: float
    block: int
    part: int


class _Operand(NamedTuple):
    """Something that queries or keys have: an array with a head in dim 1 and them in dim 2 or 3."""

    array: Any  # or its shape and dtype
    keys: bool = False
    dim: int = 3


def forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, way: Way):
    """As `attention.by_blocks`; and each query's log of the sum of exponentials, `logsum_BHT`."""
    walk = _Walk(q_BHTC, segment_BT, way)
    q, k, v = walk.turned(q_BHTC), walk.turned(k_BHSC, True), walk.upright(v_BHSV, True)
    batch, heads, _, length = q.array.shape
    block, width = walk.step.block, v_BHSV.shape[3]
    row = _Operand(jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32))
    y = jax.ShapeDtypeStruct((batch, heads, length, width), v_BHSV.dtype)
    sums = [(width, block), (1, block), (1, block)]
    outputs = [_Operand(y, dim=2), row, row]
    y, *rows = walk.run(_forward, [q, k, v], outputs, sums, q_BHTC.shape[3] + width)
    length = q_BHTC.shape[2]
    return y[:, :, :length], *(row_BH1T[:, :, 0, :length] for row_BH1T in rows)


def backward(saved, dy_BHTV, way: Way):
    """Gradients of queries, keys and values.

    Args:
        saved: the first four of `forward`, its `y_BHTV` and `logsum_BHT`.
        dy_BHTV: gradients of what was mixed.
        way: as it was for `forward`.
    """
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)
    walk = _Walk(q_BHTC, segment_BT, way)
    q, k, v = walk.turned(q_BHTC), walk.turned(k_BHSC, True), walk.upright(v_BHSV, True)
    rows = [walk.turned(row_BHT[..., None]) for row_BHT in (logsum_BHT, mean_BHT)]
    given = [q, k, v, *rows, walk.upright(dy_BHTV)]
    block, width, value = walk.step.block, q_BHTC.shape[3], v_BHSV.shape[3]
    sums = [(width, block)]
    (dq,) = walk.run(_backward_queries, given, [_like(q)], sums, 2 * width + value)
    sums, outputs = [(width, block), (block, value)], [_like(k), _like(v)]
    dk, dv = walk.run(_backward_keys, given, outputs, sums, 2 * (width + value), keys_held=True)
    found = (dq.swapaxes(2, 3), dk.swapaxes(2, 3), dv)
    return tuple(d[:, :, : a.shape[2]] for d, a in zip(found, saved[:3], strict=True))


def _like(a: _Operand) -> _Operand:
    return a._replace(array=jax.ShapeDtypeStruct(a.array.shape, a.array.dtype))


def _padded(a: jax.Array, dim: int, block: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[dim] = (0, -a.shape[dim] % block)
    return jnp.pad(a, widths, constant_values=value)


class _Walk:
    """Kernels that visit the blocks of a batch, alike for all heads."""

    def __init__(self, q: jax.Array, segment_BT: jax.Array, way: Way):
        block = way.sizes.block(q.shape[2])
        self.step = _Step(way.scale, block, way.sizes.part)
        self.heads, self.interpret = q.shape[1], way.interpret
        # Rows of padding are a document of their own: they see themselves, nobody sees them.
        self.segment_BT = _padded(segment_BT, 1, block, -1)
        self.kind_BQK = kinds(self.segment_BT, block)

    def upright(self, a: jax.Array, keys: bool = False) -> _Operand:
        """Positions are rows."""
        return _Operand(_padded(a, 2, self.step.block), keys, 2)

    def turned(self, a: jax.Array, keys: bool = False) -> _Operand:
        """Positions are columns: 192 of a head would be padded to 256 of them."""
        return _Operand(self.upright(a, keys).array.swapaxes(2, 3), keys)

    def run(self, kernel, inputs, outputs, sums, widths, *, keys_held=False):
        """Outputs of a kernel.

        Args:
            kernel: gets the step, then the table, inputs, segments, outputs and sums.
            inputs: what it reads.
            outputs: what it writes.
            sums: shapes of what it carries along a block that is held, float32.
            widths: of all products for a query and a key, added up.
            keys_held: whether blocks of keys are held while those of queries pass.
        """
        segments = [_Operand(self.segment_BT[:, None, None], keys) for keys in (False, True)]
        inputs = [*inputs, *segments]
        table, count = visits(self.kind_BQK, keys_held)
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=(self.heads, count),
            in_specs=[_spec(a, self.step.block) for a in inputs],
            out_specs=[_spec(a, self.step.block) for a in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        )
        return pl.pallas_call(
            functools.partial(kernel, self.step),
            grid_spec=grid,
            out_shape=[a.array for a in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=self._cost(widths, [*inputs, *outputs]),
            interpret=self.interpret,
            name=f"attention{kernel.__name__}",
        )(*table, *(a.array for a in inputs))

    def _cost(self, widths: int, operands: Sequence[_Operand]) -> pl.CostEstimate:
        """If a row is one document and queries are on average in the middle of it."""
        batch, length = self.segment_BT.shape
        pairs = batch * self.heads * length**2 // 2
        size = lambda a: math.prod(a.array.shape) * a.array.dtype.itemsize
        return pl.CostEstimate(2 * widths * pairs, pairs, sum(map(size, operands)))


def _spec(a: _Operand, block: int) -> pl.BlockSpec:
    _, heads, *shape = a.array.shape
    shape[a.dim - 2] = block

    def at(head, n, batch, query, key, *_):
        i = (key if a.keys else query)[n]
        return batch[n], head if heads > 1 else 0, *((i, 0) if a.dim == 2 else (0, i))

    return pl.BlockSpec((None, None, *shape), at)


def _visit(step: _Step, scalars, segments, begin: Callable, meet: Callable, end: Callable):
    """`meet(at, seen)` for parts `at` of the keys; `seen` [keys, queries] is None if all are."""
    _, query_ref, key_ref, what_ref = scalars
    n = pl.program_id(1)
    what = what_ref[n]
    ahead = (query_ref[n] - key_ref[n]) * step.block

    def seen(start):
        shape = (step.part, step.block)
        key, query = (jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
        segment_T, segment_S = (ref[...] for ref in segments)
        # A column by way of eight rows, the fewest that are turned.
        rows = jnp.broadcast_to(segment_S[:, start : start + step.part], (8, step.part))
        return (segment_T == rows.T[:, :1]) & (query - key >= start - ahead)

    def parts(masked):
        for start in range(0, step.block, step.part):
            meet(pl.ds(start, step.part), seen(start) if masked else None)

    pl.when(what & BEGIN != 0)(begin)
    pl.when(what & SOME != 0)(lambda: parts(True))
    pl.when(what & ALL != 0)(lambda: parts(False))
    pl.when(what & END != 0)(end)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward(step: _Step, *refs):
    scalars, refs = refs[:SCALARS], refs[SCALARS:]
    q, k, v, *segments, y, top, logsum, y_VT, most_1T, sum_1T = refs
    power = step.scale * LOG2E

    def begin():
        y_VT[...] = jnp.zeros_like(y_VT)
        most_1T[...] = jnp.full_like(most_1T, NONE)
        sum_1T[...] = jnp.zeros_like(sum_1T)

    def meet(at, seen):
        dot_ST = _dot(k[:, at], q[...], (0, 0))
        if seen is not None:
            dot_ST = jnp.where(seen, dot_ST, -jnp.inf)
        old, value = most_1T[...], v[at]
        new = jnp.maximum(old, dot_ST.max(axis=0, keepdims=True))
        weight_ST, shrink = jnp.exp2((dot_ST - new) * power), jnp.exp2((old - new) * power)
        most_1T[...] = new
        sum_1T[...] = sum_1T[...] * shrink + weight_ST.sum(axis=0, keepdims=True)
        y_VT[...] = y_VT[...] * shrink + _dot(value, weight_ST.astype(value.dtype), (0, 0))

    def end():
        y[...] = (y_VT[...] / sum_1T[...]).T.astype(y.dtype)
        top[...] = most_1T[...] * step.scale
        logsum[...] = top[...] + jnp.log(sum_1T[...])

    _visit(step, scalars, segments, begin, meet, end)


def _weights(step, refs, at, seen):
    """Weights, and gradients of logits without their scale; keys are rows."""
    q, k, v, logsum, mean, dy = refs
    dot_ST = _dot(k[:, at], q[...], (0, 0))
    weight_ST = jnp.exp2(dot_ST * (step.scale * LOG2E) - logsum[...] * LOG2E)
    if seen is not None:
        weight_ST = jnp.where(seen, weight_ST, 0.0)
    dweight_ST = _dot(v[at], dy[...], (1, 1)) - mean[...]
    return weight_ST.astype(dy.dtype), (weight_ST * dweight_ST).astype(q.dtype)


def _backward_queries(step: _Step, *refs):
    scalars, refs = refs[:SCALARS], refs[SCALARS:]
    *inputs, segment_T, segment_S, dq, dq_CT = refs

    def begin():
        dq_CT[...] = jnp.zeros_like(dq_CT)

    def meet(at, seen):
        _, dlogit_ST = _weights(step, inputs, at, seen)
        dq_CT[...] += _dot(inputs[1][:, at], dlogit_ST)

    def end():
        dq[...] = (dq_CT[...] * step.scale).astype(dq.dtype)

    _visit(step, scalars, (segment_T, segment_S), begin, meet, end)


def _backward_keys(step: _Step, *refs):
    scalars, refs = refs[:SCALARS], refs[SCALARS:]
    *inputs, segment_T, segment_S, dk, dv, dk_CS, dv_SV = refs

    def begin():
        dk_CS[...] = jnp.zeros_like(dk_CS)
        dv_SV[...] = jnp.zeros_like(dv_SV)

    def meet(at, seen):
        weight_ST, dlogit_ST = _weights(step, inputs, at, seen)
        dk_CS[:, at] += _dot(inputs[0][...], dlogit_ST, (1, 1))
        dv_SV[at] += _dot(weight_ST, inputs[-1][...])

    def end():
        dk[...] = (dk_CS[...] * step.scale).astype(dk.dtype)
        dv[...] = dv_SV[...].astype(dv.dtype)

    _visit(step, scalars, (segment_T, segment_S), begin, meet, end)
