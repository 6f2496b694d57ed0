"""Causal attention on TPUs: Pallas kernels.

Only blocks of queries and keys that see each other are computed (`block_pairs.py`). In a kernel
keys are rows and queries are columns: the numbers of a query (its largest logit, the sum of its
weights) are then one row, and are computed without crossing lanes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from k2jax.ops.attention.block_pairs import (
    ALL,
    BEGIN,
    END,
    SOME,
    classify_block_pairs,
    schedule_blocks,
)

NEG_INF = -1e30  # below every product; finite, so that differences are
SCALARS = 4  # the columns of the table
LOG2E = math.log2(math.e)  # TPUs raise 2 to a power, not e


class BlockSizes(NamedTuple):
    """Queries, and keys, of a block: what fits the 16 MiB that the compiler grants a kernel."""

    least: int = 512  # lengths are padded to a multiple of it
    most: int = 1024  # a block, where it divides the padded length
    part: int = 256  # keys whose logits exist at a time

    def block(self, length: int) -> int:
        """Block size for a length."""
        return math.gcd(length + -length % self.least, self.most)


class KernelParams(NamedTuple):
    """Constants that a kernel is compiled with."""

    scale: float  # of the logits
    sizes: BlockSizes = BlockSizes()
    interpret: bool = False  # run it without a TPU


class _Step(NamedTuple):
    """BlockSizes of a kernel's blocks."""

    scale: float
    block: int
    part: int


class _Operand(NamedTuple):
    """An array of queries or of keys: heads in dim 1, positions in dim 2 or 3."""

    array: Any  # or its shape and dtype
    keys: bool = False
    dim: int = 3


def forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, params: KernelParams):
    """Compute `blockwise_attention`; also each query's log of the sum of exponentials."""
    launcher = _Launcher(q_BHTC, segment_BT, params)
    q, k, v = (
        launcher.with_positions_last(q_BHTC),
        launcher.with_positions_last(k_BHSC, True),
        launcher.pad(v_BHSV, True),
    )
    batch, heads, _, length = q.array.shape
    block, width = launcher.step.block, v_BHSV.shape[3]
    row = _Operand(jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32))
    y = jax.ShapeDtypeStruct((batch, heads, length, width), v_BHSV.dtype)
    sums = [(width, block), (1, block), (1, block)]
    outputs = [_Operand(y, dim=2), row, row]
    y, *rows = launcher.run(_forward, [q, k, v], outputs, sums, q_BHTC.shape[3] + width)
    length = q_BHTC.shape[2]
    return y[:, :, :length], *(row_BH1T[:, :, 0, :length] for row_BH1T in rows)


def backward(saved, dy_BHTV, params: KernelParams):
    """Gradients of queries, keys and values.

    Args:
        saved: the first four of `forward`, its `y_BHTV` and `logsum_BHT`.
        dy_BHTV: gradient of `y_BHTV`.
        params: as for `forward`.
    """
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)
    launcher = _Launcher(q_BHTC, segment_BT, params)
    q, k, v = (
        launcher.with_positions_last(q_BHTC),
        launcher.with_positions_last(k_BHSC, True),
        launcher.pad(v_BHSV, True),
    )
    rows = [launcher.with_positions_last(row_BHT[..., None]) for row_BHT in (logsum_BHT, mean_BHT)]
    inputs = [q, k, v, *rows, launcher.pad(dy_BHTV)]
    block, width, value = launcher.step.block, q_BHTC.shape[3], v_BHSV.shape[3]
    sums = [(width, block)]
    (dq,) = launcher.run(_backward_queries, inputs, [_shape_of(q)], sums, 2 * width + value)
    sums, outputs = [(width, block), (block, value)], [_shape_of(k), _shape_of(v)]
    dk, dv = launcher.run(
        _backward_keys, inputs, outputs, sums, 2 * (width + value), keys_held=True
    )
    grads = (dq.swapaxes(2, 3), dk.swapaxes(2, 3), dv)
    return tuple(d[:, :, : a.shape[2]] for d, a in zip(grads, saved[:3], strict=True))


def _shape_of(a: _Operand) -> _Operand:
    return a._replace(array=jax.ShapeDtypeStruct(a.array.shape, a.array.dtype))


def _pad(a: jax.Array, dim: int, block: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[dim] = (0, -a.shape[dim] % block)
    return jnp.pad(a, widths, constant_values=value)


class _Launcher:
    """Runs kernels over the blocks of a batch, which are the same for all heads."""

    def __init__(self, q: jax.Array, segment_BT: jax.Array, params: KernelParams):
        block = params.sizes.block(q.shape[2])
        self.step = _Step(params.scale, block, params.sizes.part)
        self.heads, self.interpret = q.shape[1], params.interpret
        # Rows of padding are a document of their own, which no other token sees.
        self.segment_BT = _pad(segment_BT, 1, block, -1)
        self.kind_BQK = classify_block_pairs(self.segment_BT, block)

    def pad(self, a: jax.Array, keys: bool = False) -> _Operand:
        """Pad an array whose positions are rows."""
        return _Operand(_pad(a, 2, self.step.block), keys, 2)

    def with_positions_last(self, a: jax.Array, keys: bool = False) -> _Operand:
        """Pad an array and make positions columns: a head's 192 would be padded to 256 of them."""
        return _Operand(self.pad(a, keys).array.swapaxes(2, 3), keys)

    def run(self, kernel, inputs, outputs, sums, widths, *, keys_held=False):
        """Run a kernel and return its outputs.

        Args:
            kernel: takes the step, then the table, inputs, segments, outputs and sums.
            inputs: arrays that it reads.
            outputs: arrays that it writes.
            sums: float32 shapes that it carries along a block that is held.
            widths: sum over the products of a query and a key.
            keys_held: whether blocks of keys are held while those of queries pass.
        """
        segments = [_Operand(self.segment_BT[:, None, None], keys) for keys in (False, True)]
        inputs = [*inputs, *segments]
        table, count = schedule_blocks(self.kind_BQK, keys_held)
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
        """Estimate the cost for rows of one document."""
        batch, length = self.segment_BT.shape
        pairs = batch * self.heads * length**2 // 2
        arrays = [operand.array for operand in operands]
        size = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        return pl.CostEstimate(2 * widths * pairs, pairs, size)


def _spec(a: _Operand, block: int) -> pl.BlockSpec:
    _, heads, *shape = a.array.shape
    shape[a.dim - 2] = block

    def at(head, n, batch, query, key, *_):
        i = (key if a.keys else query)[n]
        return batch[n], head if heads > 1 else 0, *((i, 0) if a.dim == 2 else (0, i))

    return pl.BlockSpec((None, None, *shape), at)


def _run_step(step: _Step, scalars, segments, begin: Callable, meet: Callable, end: Callable):
    """Call `meet(at, mask)` for parts `at` of the keys.

    `mask` [keys, queries] is None where all pairs are seen.
    """
    _, query_ref, key_ref, flags_ref = scalars
    n = pl.program_id(1)
    flags = flags_ref[n]
    ahead = (query_ref[n] - key_ref[n]) * step.block

    def make_mask(start):
        shape = (step.part, step.block)
        key, query = (jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
        segment_T, segment_S = (ref[...] for ref in segments)
        # A column by way of eight rows, the fewest that can be transposed.
        rows = jnp.broadcast_to(segment_S[:, start : start + step.part], (8, step.part))
        return (segment_T == rows.T[:, :1]) & (query - key >= start - ahead)

    def parts(masked):
        for start in range(0, step.block, step.part):
            meet(pl.ds(start, step.part), make_mask(start) if masked else None)

    pl.when(flags & BEGIN != 0)(begin)
    pl.when(flags & SOME != 0)(lambda: parts(True))
    pl.when(flags & ALL != 0)(lambda: parts(False))
    pl.when(flags & END != 0)(end)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward(step: _Step, *refs):
    scalars, refs = refs[:SCALARS], refs[SCALARS:]
    q, k, v, *segments, y, top, logsum, y_VT, most_1T, sum_1T = refs
    power = step.scale * LOG2E

    def begin():
        y_VT[...] = jnp.zeros_like(y_VT)
        most_1T[...] = jnp.full_like(most_1T, NEG_INF)
        sum_1T[...] = jnp.zeros_like(sum_1T)

    def meet(at, mask):
        dot_ST = _dot(k[:, at], q[...], (0, 0))
        if mask is not None:
            dot_ST = jnp.where(mask, dot_ST, -jnp.inf)
        old, value = most_1T[...], v[at]
        new = jnp.maximum(old, dot_ST.max(axis=0, keepdims=True))
        weight_ST, rescale = jnp.exp2((dot_ST - new) * power), jnp.exp2((old - new) * power)
        most_1T[...] = new
        sum_1T[...] = sum_1T[...] * rescale + weight_ST.sum(axis=0, keepdims=True)
        y_VT[...] = y_VT[...] * rescale + _dot(value, weight_ST.astype(value.dtype), (0, 0))

    def end():
        y[...] = (y_VT[...] / sum_1T[...]).T.astype(y.dtype)
        top[...] = most_1T[...] * step.scale
        logsum[...] = top[...] + jnp.log(sum_1T[...])

    _run_step(step, scalars, segments, begin, meet, end)


def _weights(step, refs, at, mask):
    """Recompute weights, and gradients of logits without their scale; keys are rows."""
    q, k, v, logsum, mean, dy = refs
    dot_ST = _dot(k[:, at], q[...], (0, 0))
    weight_ST = jnp.exp2(dot_ST * (step.scale * LOG2E) - logsum[...] * LOG2E)
    if mask is not None:
        weight_ST = jnp.where(mask, weight_ST, 0.0)
    dweight_ST = _dot(v[at], dy[...], (1, 1)) - mean[...]
    return weight_ST.astype(dy.dtype), (weight_ST * dweight_ST).astype(q.dtype)


def _backward_queries(step: _Step, *refs):
    scalars, refs = refs[:SCALARS], refs[SCALARS:]
    *inputs, segment_T, segment_S, dq, dq_CT = refs

    def begin():
        dq_CT[...] = jnp.zeros_like(dq_CT)

    def meet(at, mask):
        _, dlogit_ST = _weights(step, inputs, at, mask)
        dq_CT[...] += _dot(inputs[1][:, at], dlogit_ST)

    def end():
        dq[...] = (dq_CT[...] * step.scale).astype(dq.dtype)

    _run_step(step, scalars, (segment_T, segment_S), begin, meet, end)


def _backward_keys(step: _Step, *refs):
    scalars, refs = refs[:SCALARS], refs[SCALARS:]
    *inputs, segment_T, segment_S, dk, dv, dk_CS, dv_SV = refs

    def begin():
        dk_CS[...] = jnp.zeros_like(dk_CS)
        dv_SV[...] = jnp.zeros_like(dv_SV)

    def meet(at, mask):
        weight_ST, dlogit_ST = _weights(step, inputs, at, mask)
        dk_CS[:, at] += _dot(inputs[0][...], dlogit_ST, (1, 1))
        dv_SV[at] += _dot(weight_ST, inputs[-1][...])

    def end():
        dk[...] = (dk_CS[...] * step.scale).astype(dk.dtype)
        dv[...] = dv_SV[...].astype(dv.dtype)

    _run_step(step, scalars, (segment_T, segment_S), begin, meet, end)
