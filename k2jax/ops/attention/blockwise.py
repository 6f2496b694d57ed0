"""Causal attention of one device: whole scores of short rows, blocks of long ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.ops.attention import gpu, tpu
from k2jax.ops.limits import ATTENTION_BLOCK

NONE = -1e30  # below every logit; finite, so that differences are


def causal_attention(
    q_BHTC: jax.Array, k_BHSC: jax.Array, v_BHSV: jax.Array, segment_BT: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Values mixed by causal softmax weights `y_BHTV`, and each query's largest logit `top_BHT`.

    Args:
        q_BHTC: queries.
        k_BHSC: keys of the same positions; S is T.
        v_BHSV: values.
        segment_BT: documents; a query sees keys of its own document up to its own position.
        scale: of the logits.

    Products are accumulated in float32; weights meet the values in their dtype. Rows of up to
    `ATTENTION_BLOCK` tokens have their scores whole, longer ones go by blocks.
    """
    way = by_scores if q_BHTC.shape[2] <= ATTENTION_BLOCK else by_blocks
    return way(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_scores(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale: float):
    """`causal_attention` with all scores at once.

    The backward pass makes the scores again from queries, keys and each row's log of the sum of
    exponentials: keeping them would cost more than making them.
    """
    return _scores_forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale)[0]


def _scores_forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale):
    hidden_BTS = _hidden(segment_BT)
    score_BHTS = _dot("bhtc,bhsc->bhts", q_BHTC, k_BHSC) * scale + hidden_BTS[:, None]
    top_BHT = score_BHTS.max(axis=-1)
    weight_BHTS = jnp.exp(score_BHTS - top_BHT[..., None])
    sum_BHT = weight_BHTS.sum(axis=-1)
    y_BHTV = _dot("bhts,bhsv->bhtv", weight_BHTS.astype(v_BHSV.dtype), v_BHSV)
    y_BHTV = (y_BHTV / sum_BHT[..., None]).astype(v_BHSV.dtype)
    saved = (q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, top_BHT + jnp.log(sum_BHT))
    return (y_BHTV, top_BHT), saved


def _scores_backward(scale, saved, grads):
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    dy_BHTV, dtype = grads[0], q_BHTC.dtype
    # Keys before queries: two of the three products below then need no transposed scores.
    hidden_BST = _hidden(segment_BT, keys_first=True)
    score_BHST = _dot("bhsc,bhtc->bhst", k_BHSC, q_BHTC) * scale + hidden_BST[:, None]
    weight_BHST = jnp.exp(score_BHST - logsum_BHT[:, :, None])
    dv_BHSV = _dot("bhst,bhtv->bhsv", weight_BHST.astype(dtype), dy_BHTV)
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)
    dweight_BHST = _dot("bhsv,bhtv->bhst", v_BHSV, dy_BHTV)
    dscore_BHST = (weight_BHST * (dweight_BHST - mean_BHT[:, :, None]) * scale).astype(dtype)
    dk_BHSC = _dot("bhst,bhtc->bhsc", dscore_BHST, q_BHTC)
    dq_BHTC = _dot("bhst,bhsc->bhtc", dscore_BHST, k_BHSC)
    return dq_BHTC.astype(dtype), dk_BHSC.astype(dtype), dv_BHSV.astype(dtype), None


by_scores.defvjp(_scores_forward, _scores_backward)


def _hidden(segment_BT: jax.Array, keys_first: bool = False) -> jax.Array:
    """Added to the logits: 0 for keys of a query's own document up to itself, else -inf.

    [batch, queries, keys]
    """
    order_T = jnp.arange(segment_BT.shape[1])
    same = segment_BT[:, :, None] == segment_BT[:, None]
    before = order_T[:, None] <= order_T if keys_first else order_T[:, None] >= order_T
    return jnp.where(same & before, 0.0, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_blocks(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale: float):
    """`causal_attention`, queries and keys meeting in pairs of blocks.

    Softmax sums are carried along [Rabe & Staats 2021; Dao 2022]. TPUs have kernels of our own, and
    GPUs for the dtypes and widths that these are `usable` for.
    """
    return _forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale)[0]


def _forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale):
    given = q_BHTC, k_BHSC, v_BHSV, segment_BT
    by = {"default": functools.partial(_mixed, scale=scale)}
    if gpu.usable(q_BHTC, v_BHSV):
        by["cuda"] = functools.partial(gpu.forward, scale=scale)
    by["tpu"] = functools.partial(tpu.forward, way=tpu.Way(scale))
    y_BHTV, top_BHT, logsum_BHT = jax.lax.platform_dependent(*given, **by)
    return (y_BHTV, top_BHT), (*given, y_BHTV, logsum_BHT)


def _backward(scale, saved, grads):
    by = {"default": functools.partial(_gradients, scale=scale)}
    if gpu.usable(saved[0], saved[2]):
        by["cuda"] = functools.partial(gpu.backward, scale=scale)
    by["tpu"] = functools.partial(tpu.backward, way=tpu.Way(scale))
    return *jax.lax.platform_dependent(saved, grads[0], **by), None


by_blocks.defvjp(_forward, _backward)


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that meet."""
    i, j = np.tril_indices(blocks)
    return i.astype(np.int32), j.astype(np.int32)


def _padded(a: jax.Array, dim: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[dim] = (0, -a.shape[dim] % ATTENTION_BLOCK)
    return jnp.pad(a, widths, constant_values=value)


def _cut(a: jax.Array, dim: int, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, i * ATTENTION_BLOCK, ATTENTION_BLOCK, dim)


def _put(a: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, block, i * ATTENTION_BLOCK, 2)


def _seen(segment_BT: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """[batch, queries, keys] of a pair of blocks."""
    same = _cut(segment_BT, 1, i)[:, :, None] == _cut(segment_BT, 1, j)[:, None]
    order = jnp.arange(ATTENTION_BLOCK)
    return same & (i * ATTENTION_BLOCK + order[:, None] >= j * ATTENTION_BLOCK + order)


def _dot(einsum: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(einsum, a, b, preferred_element_type=jnp.float32)


def _walk(body, start, blocks: int):
    """`body` for each pair of blocks; what it carries in the end."""
    step = lambda carry, pair: (body(carry, *pair), None)
    return jax.lax.scan(step, start, _pairs(blocks))[0]


def _mixed(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale):
    """What is mixed, the largest logits and the logs of the sums of exponentials."""
    # Rows of padding are a document of their own: they see themselves, nobody sees them.
    length, segment = q_BHTC.shape[2], _padded(segment_BT, 1, -1)
    q, k, v = (_padded(a, 2) for a in (q_BHTC, k_BHSC, v_BHSV))

    def meet(carry, i, j):
        y_BHTV, top_BHT, sum_BHT = carry
        logit = _dot("bhtc,bhsc->bhts", _cut(q, 2, i), _cut(k, 2, j)) * scale
        logit = jnp.where(_seen(segment, i, j)[:, None], logit, -jnp.inf)
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
    y_BHTV, top_BHT, sum_BHT = _walk(meet, start, rows[2] // ATTENTION_BLOCK)
    y_BHTV = (y_BHTV / sum_BHT[..., None])[:, :, :length].astype(v_BHSV.dtype)
    top_BHT, sum_BHT = top_BHT[:, :, :length], sum_BHT[:, :, :length]
    return y_BHTV, top_BHT, top_BHT + jnp.log(sum_BHT)


def _gradients(saved, dy_BHTV, scale):
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    segment, dtype = _padded(segment_BT, 1, -1), q_BHTC.dtype
    q, k, v, y, dy = (_padded(a, 2) for a in (q_BHTC, k_BHSC, v_BHSV, y_BHTV, dy_BHTV))
    logsum_BHT = _padded(logsum_BHT, 2)
    mean_BHT = (dy * y).astype(jnp.float32).sum(axis=-1)

    def meet(carry, i, j):
        dq_BHTC, dk_BHSC, dv_BHSV = carry
        q_i, k_j, v_j, dy_i = _cut(q, 2, i), _cut(k, 2, j), _cut(v, 2, j), _cut(dy, 2, i)
        # Keys before queries: two of the products below then need no transposed weights.
        logit = _dot("bhsc,bhtc->bhst", k_j, q_i) * scale
        seen = _seen(segment, i, j).swapaxes(1, 2)[:, None]
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
    found = _walk(meet, start, q.shape[2] // ATTENTION_BLOCK)
    own = zip(found, (q_BHTC, k_BHSC, v_BHSV), strict=True)
    return tuple(d[:, :, : a.shape[2]].astype(a.dtype) for d, a in own)
