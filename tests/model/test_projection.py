"""A weight's gradient travels once, in the dtype that was asked for, to where the weight rests."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.read import golden

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.model import Kimi
from k2jax.model import projection as layout
from k2jax.params.arrays import bind
from k2jax.params.declare import specs

GOLD = golden("kimi")
LEAVES = specs(Kimi(GOLD.cfg))
TOKENS = np.random.default_rng(0).integers(0, GOLD.cfg.vocab, (8, 16)).astype(np.int32)
MESH = MeshConfig(data=2, expert=2, context=2)
HEADS = ("batch", "heads", "length", None)


def loss(params, token, grad_dtype):
    """Through a table, and weights whose first, last and only dims are stored split."""
    w = bind(Kimi(GOLD.cfg), params, grad_dtype)
    x = layout.look_up(w.embed, token, jnp.bfloat16)
    layer = jax.tree.map(lambda a: a[0], w.layers.attention)
    q = layout.project("btd,dq->btq", x, layer.q_down, ("batch", "length", None))
    heads = layout.project("btq,qhc->bhtc", q, layer.q_up, HEADS)
    value = heads[..., : GOLD.cfg.value]
    y = layout.project("bhtv,hvd->btd", value, layer.out, ("batch", "length", None))
    return (y.astype(jnp.float32) ** 2).mean()


def with_gradient(grad_dtype, mesh):
    """The jitted gradient, and its arguments on the mesh in use."""
    names = ("embed", *(f"layers.attention.{n}" for n in ("q_down", "q_up", "out")))
    params = {name: jnp.asarray(value) for name, value in GOLD.params().items()}
    own = {name: params.pop(name) for name in names}
    token = TOKENS
    if mesh:
        put = lambda a, axes: jax.device_put(
            a, jax.NamedSharding(mesh, sharding.storage_spec(axes))
        )
        own = {name: put(a, LEAVES[name].axes) for name, a in own.items()}
        token = put(token, ("batch", "length"))
    return jax.jit(jax.grad(lambda own, token: loss(params | own, token, grad_dtype))), own, token


# In bfloat16 (8 bits) each device's sum is rounded before they are added up, and their total again.
TRAVELS = [(None, "bf16", 2**-7), ("float32", "f32", 1e-5)]


@pytest.mark.parametrize(("grad_dtype", "name", "tolerance"), TRAVELS)
def test_gradients_are_scattered_as_they_are_summed_and_in_that_dtype(grad_dtype, name, tolerance):
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        gradient, *args = with_gradient(grad_dtype, mesh)
        text = gradient.lower(*args).as_text()
        found = gradient(*args)
    scattered = re.findall(
        r'"stablehlo.reduce_scatter"[\s\S]*?\}\) : \(tensor<[\dx]*x(\w+)>\)', text
    )
    assert scattered == [name] * 3  # all but the table
    right_gradient, *args = with_gradient(grad_dtype, None)
    right = right_gradient(*args)
    for leaf in found:
        a, b = np.asarray(found[leaf]), np.asarray(right[leaf])
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), leaf
