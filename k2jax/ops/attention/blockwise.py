"""Causal attention of one device: whole scores for short rows, blocks for long ones."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.ops.attention import gpu, hopper, tpu
from k2jax.ops.limits import ATTENTION_BLOCK, cut_into_query_blocks

NEG_INF = -1e30  # below every logit; finite, so that differences are


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
    `ATTENTION_BLOCK` tokens have their scores whole, longer ones are computed by blocks.
    """
    attention = dense_attention if q_BHTC.shape[2] <= ATTENTION_BLOCK else blockwise_attention
    return attention(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def dense_attention(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale: float):
    """`causal_attention` by the scores of a few blocks of queries, each with the keys up to it.

    The backward pass recomputes the scores from queries, keys and each row's log of the sum of
    exponentials: storing them would cost more.
    """
    return _dense_forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale)[0]


def _dense_forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale):
    def mix(block: slice) -> tuple[jax.Array, ...]:
        """Mixed values of a block's queries, largest logits and logs of the sums."""
        k_part, v_part = k_BHSC[:, :, : block.stop], v_BHSV[:, :, : block.stop]
        bias_BTS = _mask_bias(segment_BT, block)
        score_BHTS = _dot("bhtc,bhsc->bhts", q_BHTC[:, :, block], k_part) * scale
        score_BHTS += bias_BTS[:, None]
        top_BHT = score_BHTS.max(axis=-1)
        weight_BHTS = jnp.exp(score_BHTS - top_BHT[..., None])
        sum_BHT = weight_BHTS.sum(axis=-1)
        y_BHTV = _dot("bhts,bhsv->bhtv", weight_BHTS.astype(v_part.dtype), v_part)
        y_BHTV = (y_BHTV / sum_BHT[..., None]).astype(v_part.dtype)
        return y_BHTV, top_BHT, top_BHT + jnp.log(sum_BHT)

    parts = zip(*map(mix, cut_into_query_blocks(q_BHTC.shape[2])), strict=True)
    y_BHTV, top_BHT, logsum_BHT = (jnp.concatenate(part, axis=2) for part in parts)
    return (y_BHTV, top_BHT), (q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT)


def _dense_backward(scale, saved, grads):
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    dy_BHTV, dtype = grads[0], q_BHTC.dtype
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)

    def differentiate(block: slice) -> tuple[jax.Array, ...]:
        """A block's gradients: of its queries, and of the keys and values up to them."""
        q_part, dy_part = q_BHTC[:, :, block], dy_BHTV[:, :, block]
        k_part, v_part = k_BHSC[:, :, : block.stop], v_BHSV[:, :, : block.stop]
        # Keys before queries: two of the three products below then need no transposed scores.
        bias_BST = _mask_bias(segment_BT, block).swapaxes(1, 2)
        score_BHST = _dot("bhsc,bhtc->bhst", k_part, q_part) * scale + bias_BST[:, None]
        weight_BHST = jnp.exp(score_BHST - logsum_BHT[:, :, None, block])
        dv_BHSV = _dot("bhst,bhtv->bhsv", weight_BHST.astype(dtype), dy_part)
        dweight_BHST = _dot("bhsv,bhtv->bhst", v_part, dy_part)
        dscore_BHST = weight_BHST * (dweight_BHST - mean_BHT[:, :, None, block])
        dscore_BHST = dscore_BHST.astype(dtype)
        dk_BHSC = _dot("bhst,bhtc->bhsc", dscore_BHST, q_part) * scale
        return _dot("bhst,bhsc->bhtc", dscore_BHST, k_part) * scale, dk_BHSC, dv_BHSV

    *rest, last = map(differentiate, cut_into_query_blocks(q_BHTC.shape[2]))
    _, dk_BHSC, dv_BHSV = last  # of all keys
    for _, dk_part, dv_part in rest:
        dk_BHSC = dk_BHSC.at[:, :, : dk_part.shape[2]].add(dk_part)
        dv_BHSV = dv_BHSV.at[:, :, : dv_part.shape[2]].add(dv_part)
    dq_BHTC = jnp.concatenate([part[0] for part in (*rest, last)], axis=2)
    return dq_BHTC.astype(dtype), dk_BHSC.astype(dtype), dv_BHSV.astype(dtype), None


dense_attention.defvjp(_dense_forward, _dense_backward)


def _mask_bias(segment_BT: jax.Array, block: slice) -> jax.Array:
    """Bias of the logits: 0 for keys of a query's own document up to itself, else -inf.

    Returns:
        [batch, queries of the block, keys up to its last].
    """
    # From 1: what counts from 0 XLA computes element by element, which CPUs do slower than exp.
    order_S = np.arange(1, block.stop + 1, dtype=np.int32)
    same_BTS = segment_BT[:, block, None] == segment_BT[:, None, : block.stop]
    return jnp.where(same_BTS & (order_S[block, None] >= order_S), 0.0, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale: float):
    """`causal_attention` by pairs of blocks of queries and keys.

    Softmax sums are carried along [Rabe & Staats 2021; Dao 2022]. TPUs have kernels of our own, and
    so have GPUs where the dtype and the widths are supported: Mosaic compiles Hopper's, and Triton
    Blackwell's as long as Pallas has it.
    """
    return _forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale)[0]


def _gpu_kernels(q_BHTC: jax.Array, v_BHSV: jax.Array) -> ModuleType | None:
    """The kernels that a GPU gets, if any, of those that are made for it."""
    for kernels in (hopper, gpu):
        if kernels.is_supported(q_BHTC, v_BHSV):
            return kernels
    return None


def _forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale):
    args = q_BHTC, k_BHSC, v_BHSV, segment_BT
    kernels = {"default": functools.partial(_blocks_forward, scale=scale)}
    if on_gpu := _gpu_kernels(q_BHTC, v_BHSV):
        kernels["cuda"] = functools.partial(on_gpu.forward, scale=scale)
    kernels["tpu"] = functools.partial(tpu.forward, params=tpu.KernelParams(scale))
    y_BHTV, top_BHT, logsum_BHT = jax.lax.platform_dependent(*args, **kernels)
    return (y_BHTV, top_BHT), (*args, y_BHTV, logsum_BHT)


def _backward(scale, saved, grads):
    kernels = {"default": functools.partial(_blocks_backward, scale=scale)}
    if on_gpu := _gpu_kernels(saved[0], saved[2]):
        kernels["cuda"] = functools.partial(on_gpu.backward, scale=scale)
    kernels["tpu"] = functools.partial(tpu.backward, params=tpu.KernelParams(scale))
    return *jax.lax.platform_dependent(saved, grads[0], **kernels), None


blockwise_attention.defvjp(_forward, _backward)


def _block_pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of queries and of keys that see each other."""
    i, j = np.tril_indices(blocks)
    return i.astype(np.int32), j.astype(np.int32)


def _pad(a: jax.Array, dim: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[dim] = (0, -a.shape[dim] % ATTENTION_BLOCK)
    return jnp.pad(a, widths, constant_values=value)


def _get_block(a: jax.Array, dim: int, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, i * ATTENTION_BLOCK, ATTENTION_BLOCK, dim)


def _set_block(a: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, block, i * ATTENTION_BLOCK, 2)


def _add_block(a: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
    return _set_block(a, _get_block(a, 2, i) + block, i)


def _is_seen(segment_BT: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Which keys of a block each query of another sees: bool [batch, queries, keys]."""
    same = _get_block(segment_BT, 1, i)[:, :, None] == _get_block(segment_BT, 1, j)[:, None]
    order = jnp.arange(ATTENTION_BLOCK)
    return same & (i * ATTENTION_BLOCK + order[:, None] >= j * ATTENTION_BLOCK + order)


def _dot(einsum: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(einsum, a, b, preferred_element_type=jnp.float32)


def _scan_pairs(body, start, blocks: int):
    """Run `body` for each pair of blocks; return what it carries in the end."""
    return jax.lax.scan(
        lambda carry, pair: (body(carry, *pair), None), start, _block_pairs(blocks)
    )[0]


def _blocks_forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, scale):
    """Mixed values, largest logits and logs of the sums of exponentials."""
    # Rows of padding are a document of their own, which no other token sees.
    length, segment = q_BHTC.shape[2], _pad(segment_BT, 1, -1)
    q, k, v = (_pad(a, 2) for a in (q_BHTC, k_BHSC, v_BHSV))

    def meet(carry, i, j):
        y_BHTV, top_BHT, sum_BHT = carry
        logit = _dot("bhtc,bhsc->bhts", _get_block(q, 2, i), _get_block(k, 2, j)) * scale
        logit = jnp.where(_is_seen(segment, i, j)[:, None], logit, -jnp.inf)
        old = _get_block(top_BHT, 2, i)
        top = jnp.maximum(old, logit.max(axis=-1))
        weight, rescale = jnp.exp(logit - top[..., None]), jnp.exp(old - top)
        value = _get_block(v, 2, j)
        y = _dot("bhts,bhsv->bhtv", weight.astype(value.dtype), value)
        return (
            _set_block(y_BHTV, _get_block(y_BHTV, 2, i) * rescale[..., None] + y, i),
            _set_block(top_BHT, top, i),
            _set_block(sum_BHT, _get_block(sum_BHT, 2, i) * rescale + weight.sum(axis=-1), i),
        )

    rows = q.shape[:3]
    start = (jnp.zeros((*rows, v.shape[3])), jnp.full(rows, NEG_INF), jnp.zeros(rows))
    y_BHTV, top_BHT, sum_BHT = _scan_pairs(meet, start, rows[2] // ATTENTION_BLOCK)
    y_BHTV = (y_BHTV / sum_BHT[..., None])[:, :, :length].astype(v_BHSV.dtype)
    top_BHT, sum_BHT = top_BHT[:, :, :length], sum_BHT[:, :, :length]
    return y_BHTV, top_BHT, top_BHT + jnp.log(sum_BHT)


def _blocks_backward(saved, dy_BHTV, scale):
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    segment, dtype = _pad(segment_BT, 1, -1), q_BHTC.dtype
    q, k, v, y, dy = (_pad(a, 2) for a in (q_BHTC, k_BHSC, v_BHSV, y_BHTV, dy_BHTV))
    logsum_BHT = _pad(logsum_BHT, 2)
    mean_BHT = (dy * y).astype(jnp.float32).sum(axis=-1)

    def meet(carry, i, j):
        dq_BHTC, dk_BHSC, dv_BHSV = carry
        q_i, k_j, v_j, dy_i = (
            _get_block(q, 2, i),
            _get_block(k, 2, j),
            _get_block(v, 2, j),
            _get_block(dy, 2, i),
        )
        # Keys before queries: two of the products below then need no transposed weights.
        logit = _dot("bhsc,bhtc->bhst", k_j, q_i) * scale
        seen = _is_seen(segment, i, j).swapaxes(1, 2)[:, None]
        weight = jnp.where(seen, jnp.exp(logit - _get_block(logsum_BHT, 2, i)[:, :, None]), 0.0)
        dweight = _dot("bhsv,bhtv->bhst", v_j, dy_i) - _get_block(mean_BHT, 2, i)[:, :, None]
        dlogit = (weight * dweight * scale).astype(dtype)
        return (
            _add_block(dq_BHTC, i, _dot("bhst,bhsc->bhtc", dlogit, k_j)),
            _add_block(dk_BHSC, j, _dot("bhst,bhtc->bhsc", dlogit, q_i)),
            _add_block(dv_BHSV, j, _dot("bhst,bhtv->bhsv", weight.astype(dtype), dy_i)),
        )

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    grads = _scan_pairs(meet, start, q.shape[2] // ATTENTION_BLOCK)
    own = zip(grads, (q_BHTC, k_BHSC, v_BHSV), strict=True)
    return tuple(d[:, :, : a.shape[2]].astype(a.dtype) for d, a in own)
