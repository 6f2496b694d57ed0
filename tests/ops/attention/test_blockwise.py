"""Attention by blocks is attention with its scores whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.model.attention import sharded_attention
from k2jax.ops.attention import blockwise as attention
from k2jax.ops.attention import tpu
from k2jax.ops.limits import ATTENTION_BLOCK

B, H, C, V = 2, 4, 12, 8


def drawn(length):
    rng = np.random.default_rng(0)

    def cast(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    segment = np.ones((B, length), np.int32)
    segment[0, length // 3 :] = 2  # its keys are blocks away from the first document's
    segment[1, length - 5 :] = 0
    q, k, v = cast(B, H, length, C) * 3, cast(B, H, length, C), cast(B, H, length, V)
    return q, k, v, segment, cast(B, H, length, V)


def differentiated(mix):
    @jax.jit
    def both(q, k, v, segment, dy):
        y, back, top = jax.vjp(lambda q, k, v: mix(q, k, v, segment, 0.3), q, k, v, has_aux=True)
        return [y, top, *back(dy)]

    return both


def compare(ours, right, tolerance):
    for i, (a, b) in enumerate(zip(ours, right, strict=True)):
        assert np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max(), i


def rows_of(mix):
    def head_maximum(q, k, v, segment, scale):
        y, top = mix(q, k, v, segment, scale)
        return y, jnp.where((segment > 0)[:, None], top, -jnp.inf).max(axis=(0, 2))

    return head_maximum


@pytest.mark.device
@pytest.mark.parametrize("length", [ATTENTION_BLOCK + 1, 2 * ATTENTION_BLOCK + 100])
def test_values_gradients_and_largest_logits_are_those_of_whole_scores(length):
    inputs = drawn(length)
    right = differentiated(rows_of(attention.dense_attention))(*inputs)
    ours = differentiated(sharded_attention)(*inputs)
    # Sums of up to 1,124 float32 terms in another order.
    compare(ours, [np.asarray(a) for a in right], 1e-5)


@pytest.mark.parametrize("length", [64, 2 * ATTENTION_BLOCK])
@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=2, model=2), MeshConfig(context=2), MeshConfig(model=2, context=2)],
    ids=str,
)
def test_on_a_mesh_they_are_those_of_one_device(config, length):
    inputs = drawn(length)
    right = differentiated(sharded_attention)(*inputs)
    heads = ("batch", "heads", "length", None)
    with jax.set_mesh(sharding.make_mesh(config)):
        axes = (heads, heads, heads, ("batch", "length"), heads)
        mesh = jax.sharding.get_mesh()

        def put(a, axes):
            return jax.device_put(a, jax.NamedSharding(mesh, sharding.storage_spec(axes)))

        ours = differentiated(sharded_attention)(*map(put, inputs, axes))
        compare(jax.device_get(ours), [np.asarray(a) for a in right], 1e-5)


@pytest.mark.parametrize("length", [77, 96])  # 77 is padded
def test_the_tpu_kernels_give_those_of_whole_scores(length):
    inputs = drawn(length)
    right = differentiated(attention.dense_attention)(*inputs)
    params = tpu.KernelParams(0.3, tpu.BlockSizes(least=16, most=32, part=8), interpret=True)

    @jax.jit
    def ours(*inputs):
        *args, dy = inputs
        y, top, logsum = tpu.forward(*args, params)
        return y, top, *tpu.backward((*args, y, logsum), dy, params)

    compare(ours(*inputs), right, 1e-5)
