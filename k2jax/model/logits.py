"""Compute logits from activations, and losses without all logits at once."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from k2jax.model.cross_entropy import cross_entropy
from k2jax.model.projection import Policy, project, read_weight, sharded_einsum
from k2jax.ops.collectives import gather_over, sum_over
from k2jax.ops.limits import LOGITS_BYTES
from k2jax.sharding import axes_of, meshless, reshard, storage_spec

ROWS, WEIGHT = ("batch", "length"), ("embed", "vocab")


def head(w: nnx.Variable, x_BTD: jax.Array, policy: Policy) -> jax.Array:
    """Next-token logits `y_BTX`: in the compute dtype, then cast to float32 [JLE 1616]."""
    return project("btd,dx->btx", x_BTD, w, (*ROWS, "vocab"), policy).astype(jnp.float32)


def pick_tokens(x_BTD: jax.Array, token_N: jax.Array) -> jax.Array:
    """Take some tokens' activations `x_N1D`, spread like a batch; `token_N` is b * T + t."""
    rows, length, width = x_BTD.shape
    if meshless():
        return x_BTD.reshape(rows * length, 1, width)[token_N]

    def on_device(x_BTD, token_N):
        """Others' tokens are 0 here."""
        x_MD, axes = x_BTD.reshape(-1, width), axes_of("batch")
        at_N = token_N - jax.lax.axis_index(axes) * len(x_MD)
        at_N = jnp.where(at_N < 0, len(x_MD), at_N)
        return sum_over(x_MD.at[at_N].get(mode="fill", fill_value=0), axes)

    x_ND = jax.shard_map(
        on_device,
        in_specs=(storage_spec((*ROWS, None)), P()),
        out_specs=P(),
        check_vma=False,
    )(x_BTD, token_N)
    return reshard(x_ND[:, None], *ROWS, None)


def losses(w: nnx.Variable, x_BTD: jax.Array, target_BT: jax.Array, policy: Policy) -> jax.Array:
    """Compute the negative log likelihood of each target in nats, float32 [batch, length].

    Args:
        w: the head.
        x_BTD: normed activations.
        target_BT: int32 token ids.
        policy: how weights are read.

    Where a device's logits would take more than `LOGITS_BYTES`, it goes through the vocabulary
    in parts: only one part of the logits, and of the gathered head, exists at a time.
    """
    weight_DX = read_weight(w, policy)
    chunks = _chunks(x_BTD, weight_DX)
    if chunks == 1:
        return cross_entropy(head(w, x_BTD, policy), target_BT)
    if meshless():
        return _by_chunks(weight_DX, x_BTD, target_BT, chunks=chunks)
    body = jax.shard_map(
        functools.partial(_by_chunks, chunks=chunks, policy=policy),
        in_specs=(storage_spec(WEIGHT), storage_spec((*ROWS, None)), storage_spec(ROWS)),
        out_specs=storage_spec(ROWS),
        check_vma=False,  # a custom gradient inside; tests compare with one device
    )
    return body(weight_DX, x_BTD, target_BT)


def _chunks(x_BTD: jax.Array, weight_DX: jax.Array) -> int:
    """Count the fewest parts of a device's vocabulary, all of one size, within `LOGITS_BYTES`."""
    (rows, length, _), (_, vocab) = _local_shape(x_BTD), _local_shape(weight_DX)

    def fits(parts: int) -> bool:
        return vocab % parts == 0 and 4 * rows * length * (vocab // parts) <= LOGITS_BYTES

    return next(n for n in range(1, vocab + 1) if fits(n) or n == vocab)


def _local_shape(a: jax.Array) -> tuple[int, ...]:
    return a.shape if meshless() else jax.typeof(a).sharding.shard_shape(a.shape)


def _by_chunks(weight_DX, x_BTD, target_BT, *, chunks: int, policy: Policy | None = None):
    """Compute one device's losses, from its part of the width and of the vocabulary.

    With a `policy` there is a mesh.
    """
    mesh = policy is not None
    size = weight_DX.shape[1] // chunks
    first = jax.lax.axis_index("model") * weight_DX.shape[1] if mesh else 0

    @jax.checkpoint
    def part(weight_DX, x_BTD, i):
        weight_DV = jax.lax.dynamic_slice_in_dim(weight_DX, i * size, size, axis=1)
        if policy is not None:
            weight_DV = gather_over(weight_DV, storage_spec(WEIGHT)[0], 0, policy.grad_dtype)
        y_BTV = sharded_einsum("btd,dv->btv", None, None, None, x_BTD, weight_DV).astype(
            jnp.float32
        )
        top_BT = jax.lax.stop_gradient(y_BTV.max(axis=-1))
        hit_BTV = target_BT[..., None] == first + i * size + jnp.arange(size)
        sum_BT = jnp.exp(y_BTV - top_BT[..., None]).sum(axis=-1)
        return top_BT, sum_BT, jnp.where(hit_BTV, y_BTV, 0.0).sum(axis=-1)

    top_CBT, sum_CBT, target_CBT = jax.lax.scan(
        lambda _, i: (None, part(weight_DX, x_BTD, i)), None, jnp.arange(chunks)
    )[1]
    top_CBT = jax.lax.stop_gradient(top_CBT)
    top_BT = top_CBT.max(axis=0)
    if mesh:
        top_BT = jax.lax.pmax(top_BT, "model")
    sum_BT = (sum_CBT * jnp.exp(top_CBT - top_BT)).sum(axis=0)
    target_BT = target_CBT.sum(axis=0)
    if mesh:
        sum_BT, target_BT = sum_over((sum_BT, target_BT), "model")
    return jnp.log(sum_BT) + top_BT - target_BT
