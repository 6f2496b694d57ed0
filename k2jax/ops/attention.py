"""Causal attention of one device, block by block: scores are never there as a whole."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.ops import attention_gpu as gpu
from k2jax.ops import attention_tpu as tpu

BLOCK = 512  # queries, and keys, that meet at a time
NONE = -1e30  # below every logit; finite, so that differences are


class _Place(NamedTuple):
    """Where queries and keys stand: what a query may see."""

    segment_BT: jax.Array
    segment_BS: jax.Array
    order_T: jax.Array
    order_S: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def by_blocks(q_BHTC, k_BHSC, v_BHSV, segments, first, scale: float, causal: bool):
    """Values mixed by softmax weights `y_BHTV`, and each query's largest logit `top_BHT`.

    Args:
        q_BHTC: queries; positions `first` to `first + T` of a row.
        k_BHSC: keys of the whole row.
        v_BHSV: values.
        segments: documents of the queries [B, T] and of the keys [B, S]; a query sees keys of its
            own document up to its own position.
        first: int32 scalar.
        scale: of the logits.
        causal: whether `first` is known to be 0, so that later keys need not be looked at.

    Products are accumulated in float32; weights meet the values in their dtype. Queries and keys
    meet in pairs of blocks, softmax sums are carried along [Rabe & Staats 2021; Dao 2022]. TPUs
    have kernels of our own, and GPUs for the dtypes and widths that these are `usable` for.
    """
    return _forward(q_BHTC, k_BHSC, v_BHSV, segments, first, scale, causal)[0]


def _forward(q_BHTC, k_BHSC, v_BHSV, segments, first, scale, causal):
    given = q_BHTC, k_BHSC, v_BHSV, segments, first
    by = {"default": functools.partial(_mixed, scale=scale, causal=causal)}
    if gpu.usable(q_BHTC, v_BHSV):
        by["cuda"] = functools.partial(gpu.forward, scale=scale)
    by["tpu"] = functools.partial(tpu.forward, way=tpu.Way(scale, causal))
    y_BHTV, top_BHT, logsum_BHT = jax.lax.platform_dependent(*given, **by)
    return (y_BHTV, top_BHT), (*given, y_BHTV, logsum_BHT)


def _backward(scale, causal, saved, grads):
    by = {"default": functools.partial(_gradients, scale=scale, causal=causal)}
    if gpu.usable(saved[0], saved[2]):
        by["cuda"] = functools.partial(gpu.backward, scale=scale)
    by["tpu"] = functools.partial(tpu.backward, way=tpu.Way(scale, causal))
    return *jax.lax.platform_dependent(saved, grads[0], **by), None, None


by_blocks.defvjp(_forward, _backward)


def _pairs(queries: int, keys: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that meet."""
    cells = [(i, j) for i in range(queries) for j in range(keys) if not causal or j <= i]
    first, second = zip(*cells, strict=True)
    return np.array(first, np.int32), np.array(second, np.int32)


def _padded(a: jax.Array, dim: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[dim] = (0, -a.shape[dim] % BLOCK)
    return jnp.pad(a, widths, constant_values=value)


def _places(segments, first: jax.Array) -> _Place:
    # Rows of padding are a document of their own: they see themselves, nobody sees them.
    segment_BT, segment_BS = (_padded(a, 1, -1) for a in segments)
    order = lambda a: jnp.arange(a.shape[1])
    return _Place(segment_BT, segment_BS, order(segment_BT) + first, order(segment_BS))


def _cut(a: jax.Array, dim: int, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, i * BLOCK, BLOCK, dim)


def _put(a: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, block, i * BLOCK, 2)


def _seen(place: _Place, i: jax.Array, j: jax.Array) -> jax.Array:
    """[batch, queries, keys] of a pair of blocks."""
    same = _cut(place.segment_BT, 1, i)[:, :, None] == _cut(place.segment_BS, 1, j)[:, None]
    return same & (_cut(place.order_T, 0, i)[:, None] >= _cut(place.order_S, 0, j))


def _dot(einsum: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(einsum, a, b, preferred_element_type=jnp.float32)


def _walk(body, start, blocks: tuple[int, int], causal: bool):
    """`body` for each pair of blocks; what it carries in the end."""
    step = lambda carry, pair: (body(carry, *pair), None)
    return jax.lax.scan(step, start, _pairs(*blocks, causal))[0]


def _mixed(q_BHTC, k_BHSC, v_BHSV, segments, first, scale, causal):
    """What is mixed, the largest logits and the logs of the sums of exponentials."""
    length, place = q_BHTC.shape[2], _places(segments, first)
    q, k, v = (_padded(a, 2) for a in (q_BHTC, k_BHSC, v_BHSV))

    def meet(carry, i, j):
        y_BHTV, top_BHT, sum_BHT = carry
        logit = _dot("bhtc,bhsc->bhts", _cut(q, 2, i), _cut(k, 2, j)) * scale
        logit = jnp.where(_seen(place, i, j)[:, None], logit, -jnp.inf)
        old = _cut(top_BHT, 2, i)
        top = jnp.maximum(old, logit.max(axis=-1))
        weight, shrink = jnp.exp(logit - top[..., None]), jnp.exp(old - top)
        value = _cut(v, 2, j)
        y = _dot("bhts,bhsv->bhtv", weight.astype(value.dtype), value)
        return (
            _put(y_BHTV, _cut(y_BHTV, 2, i) * shrink[..., None] + y, i),
            _put(top_BHT, top, i),
            _put(sum_BHT, _cut(sum_BHT, 2, i) * shrink + weight.sum(axis=-1), i),
        )

    rows = q.shape[:3]
    start = (jnp.zeros((*rows, v.shape[3])), jnp.full(rows, NONE), jnp.zeros(rows))
    blocks = (rows[2] // BLOCK, k.shape[2] // BLOCK)
    y_BHTV, top_BHT, sum_BHT = _walk(meet, start, blocks, causal)
    y_BHTV = (y_BHTV / sum_BHT[..., None])[:, :, :length].astype(v_BHSV.dtype)
    top_BHT, sum_BHT = top_BHT[:, :, :length], sum_BHT[:, :, :length]
    return y_BHTV, top_BHT, top_BHT + jnp.log(sum_BHT)


def _gradients(saved, dy_BHTV, scale, causal):
    q_BHTC, k_BHSC, v_BHSV, segments, first, y_BHTV, logsum_BHT = saved
    place, dtype = _places(segments, first), q_BHTC.dtype
    q, k, v, y, dy = (_padded(a, 2) for a in (q_BHTC, k_BHSC, v_BHSV, y_BHTV, dy_BHTV))
    logsum_BHT = _padded(logsum_BHT, 2)
    mean_BHT = (dy * y).astype(jnp.float32).sum(axis=-1)

    def meet(carry, i, j):
        dq_BHTC, dk_BHSC, dv_BHSV = carry
        q_i, k_j, v_j, dy_i = _cut(q, 2, i), _cut(k, 2, j), _cut(v, 2, j), _cut(dy, 2, i)
        # Keys before queries: two of the products below then need no transposed weights.
        logit = _dot("bhsc,bhtc->bhst", k_j, q_i) * scale
        seen = _seen(place, i, j).swapaxes(1, 2)[:, None]
        weight = jnp.where(seen, jnp.exp(logit - _cut(logsum_BHT, 2, i)[:, :, None]), 0.0)
        dweight = _dot("bhsv,bhtv->bhst", v_j, dy_i) - _cut(mean_BHT, 2, i)[:, :, None]
        dlogit = (weight * dweight * scale).astype(dtype)
        add = lambda a, n, block: _put(a, _cut(a, 2, n) + block, n)
        return (
            add(dq_BHTC, i, _dot("bhst,bhsc->bhtc", dlogit, k_j)),
            add(dk_BHSC, j, _dot("bhst,bhtc->bhsc", dlogit, q_i)),
            add(dv_BHSV, j, _dot("bhst,bhtv->bhsv", weight.astype(dtype), dy_i)),
        )

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    found = _walk(meet, start, (q.shape[2] // BLOCK, k.shape[2] // BLOCK), causal)
    own = zip(found, (q_BHTC, k_BHSC, v_BHSV), strict=True)
    return tuple(d[:, :, : a.shape[2]].astype(a.dtype) for d, a in own)
