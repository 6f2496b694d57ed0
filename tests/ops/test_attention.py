"""Attention by blocks is attention with its scores whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.model import attention
from k2jax.ops import attention_tpu as tpu
from k2jax.ops.attention import BLOCK

B, H, C, V = 2, 2, 12, 8


def drawn(length):
    rng = np.random.default_rng(0)
    cast = lambda *shape: rng.standard_normal(shape).astype(np.float32)
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


def compare(found, right, tolerance):
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max(), i


def rows_of(mix):
    def head_maximum(q, k, v, segment, scale):
        y, top = mix(q, k, v, segment, scale)
        return y, jnp.where((segment > 0)[:, None], top, -jnp.inf).max(axis=(0, 2))

    return head_maximum


@pytest.mark.parametrize("length", [BLOCK + 1, 2 * BLOCK + 100])
def test_values_gradients_and_largest_logits_are_those_of_whole_scores(length):
    inputs = drawn(length)
    right = differentiated(rows_of(attention._mix))(*inputs)
    found = differentiated(attention.softmax_mix)(*inputs)
    # Sums of up to 1,124 float32 terms in another order.
    compare(found, [np.asarray(a) for a in right], 1e-5)


@pytest.mark.parametrize("config", [MeshConfig(data=2, model=2), MeshConfig(context=2)], ids=str)
def test_on_a_mesh_they_are_those_of_one_device(config):
    inputs = drawn(4 * BLOCK)
    right = differentiated(attention.softmax_mix)(*inputs)
    queries, keys = ("batch", "heads", "length", None), ("batch", "heads", None, None)
    with jax.set_mesh(sharding.make(config)):
        axes = (queries, keys, keys, ("batch", "length"), queries)
        mesh = jax.sharding.get_mesh()
        put = lambda a, axes: jax.device_put(
            a, jax.NamedSharding(mesh, sharding.storage_spec(axes))
        )
        found = differentiated(attention.softmax_mix)(*map(put, inputs, axes))
        compare(jax.device_get(found), [np.asarray(a) for a in right], 1e-5)


# Everything is padded; then the queries of one device of several.
@pytest.mark.parametrize(("length", "own"), [(77, slice(0, 77)), (96, slice(32, 80))], ids=str)
def test_the_tpu_kernels_give_those_of_whole_scores(length, own):
    q, k, v, segment, dy = drawn(length)
    dy[:, :, : own.start] = dy[:, :, own.stop :] = 0
    right = differentiated(attention._mix)(q, k, v, segment, dy)
    way = tpu.Way(0.3, own.start == 0, tpu.Sizes(least=16, most=32, part=8), interpret=True)

    @jax.jit
    def found(q, k, v, segment, dy, first):
        inputs = (q, k, v, (segment[:, own], segment), first)
        y, top, logsum = tpu.forward(*inputs, way)
        return y, top, *tpu.backward((*inputs, y, logsum), dy, way)

    gradients = found(q[:, :, own], k, v, segment, dy[:, :, own], jnp.int32(own.start))
    compare(gradients, [*(a[:, :, own] for a in right[:3]), *right[3:]], 1e-5)
