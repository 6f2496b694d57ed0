"""Inference: weights rest where they are used, and a step moves tokens only."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from k2jax import configs, sharding
from k2jax.config import ConfigError, MeshConfig, Yarn
from k2jax.inference.cache import pool_spec
from k2jax.inference.forward import forward, list_depths, split_weights
from k2jax.inference.paged_attention import Chunks
from k2jax.model import Kimi, Policy
from k2jax.ops.moe import Dispatch
from k2jax.params.arrays import abstract
from k2jax.params.declare import specs
from k2jax.planner.hlo import account

K2 = specs(Kimi(configs.load("kimi_k2").model))
PLANS = {
    "embed": P("model", None),
    "head": P(None, "model"),
    "layers.attention.q_down": P(None, None, None),
    "layers.attention.q_up": P(None, None, "model", None),
    "layers.attention.kv_up": P(None, None, "model", None),
    "layers.moe.experts.gate": P(None, "expert", None, "model"),
    "layers.moe.experts.down": P(None, "expert", "model", None),
    "layers.moe.shared.up": P(None, None, "model"),
}
SMALL = dataclasses.replace(
    configs.load("tiny").model,
    vocab=512,
    embed=64,
    moe_layers=2,
    heads=8,
    q_rank=48,
    kv_rank=32,
    ffw=128,
    experts=32,
    expert_ffw=64,
    experts_per_token=2,
    context=32,
    yarn=Yarn(),
)


def small_mesh(**axes: int) -> jax.sharding.Mesh:
    return sharding.inference_mesh(sharding.make_mesh(MeshConfig(**axes)), specs(Kimi(SMALL)))


@pytest.mark.parametrize("name", PLANS)
def test_k2_rests_where_it_is_used(name):
    with jax.set_mesh(small_mesh(expert=4, model=2)):
        assert sharding.storage_spec(K2[name].axes) == PLANS[name]
        assert sharding.compute_spec(K2[name].axes) == PLANS[name]


def test_devices_that_split_the_batch_in_training_split_heads_or_are_replicas():
    wide = small_mesh(data=2, expert=2, context=2)
    assert dict(wide.shape) == {"replica": 1, "expert": 2, "model": 4}
    whole = sharding.make_mesh(MeshConfig(data=2, expert=4))
    narrow = specs(Kimi(dataclasses.replace(SMALL, heads=1)))
    assert dict(sharding.inference_mesh(whole, narrow).shape) == {
        "replica": 2,
        "expert": 4,
        "model": 1,
    }
    # Members of a group along `model` are those that were neighbours along `data` and `context`.
    ids = [[device.id for device in group] for group in wide.devices[0]]
    assert ids == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_mesh_that_divides_the_model_in_no_way_is_refused():
    with pytest.raises(ConfigError, match="mesh expert=8 splits 'experts'"):
        few = specs(Kimi(dataclasses.replace(SMALL, experts=4)))
        sharding.inference_mesh(sharding.make_mesh(MeshConfig(expert=8)), few)


@pytest.mark.parametrize("kind", ["allgather", "alltoall"])
def test_no_collective_of_a_decode_step_carries_a_weight(kind):
    rows = 8
    with jax.set_mesh(small_mesh(replica=2, expert=2, model=2)):
        params = abstract(specs(Kimi(SMALL)))
        matrices = [
            math.prod(array.sharding.shard_shape(array.shape)[1:])
            for name, array in params.items()
            if specs(Kimi(SMALL))[name].contracted and name != "head"
        ]

        def run(params, token_BT, start_B):
            policy = Policy("float32", dispatch=Dispatch(kind))
            layer = jax.reshard(jnp.zeros((16, 16, SMALL.size("latent"))), pool_spec(False))
            pool = tuple((layer,) * -depth for depth in list_depths(SMALL))
            one, table = jnp.ones(rows, jnp.int32), jnp.ones((rows, 2), jnp.int32)
            chunks = Chunks(token_BT, start_B, one, table, jnp.arange(rows))
            return forward(split_weights(params, SMALL), pool, chunks, SMALL, policy)[0]

        def tokens(*shape):
            layout = sharding.storage_spec(("batch", None)[: len(shape)])
            return jax.ShapeDtypeStruct(
                shape, jnp.int32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), layout)
            )

        text = jax.jit(run).lower(params, tokens(rows, 1), tokens(rows)).compile().as_text()
    counted = account(text)
    assert 0 < counted.largest < 4 * min(matrices)
