"""Plans: what splits what, meshes that do not divide, and every named run traced at full size."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from k2jax import configs, sharding
from k2jax.config import ConfigError, MeshConfig
from k2jax.model import Kimi
from k2jax.model.batch import micro_spec
from k2jax.params.arrays import abstract
from k2jax.params.declare import specs
from k2jax.training.step import build

K2 = configs.load("kimi_k2")
LEAVES = specs(Kimi(K2.model))
FSDP = "expert"

# Stored, and used; dims as in the spec of the parameter, the stack of layers first.
PLANS = {
    "embed": (P("model", FSDP), P("model", None)),
    "head": (P(FSDP, "model"), P(None, "model")),
    "norm": (P(None), P(None)),
    "layers.attention_norm": (P(None, None), P(None, None)),
    "layers.attention.q_down": (P(None, FSDP, None), P(None, None, None)),
    "layers.attention.q_up": (P(None, "expert", "model", None), P(None, None, "model", None)),
    "layers.attention.kv_up": (P(None, "expert", "model", None), P(None, None, "model", None)),
    "layers.attention.out": (P(None, "model", None, FSDP), P(None, "model", None, None)),
    "layers.moe.router": (P(None, FSDP, None), P(None, None, None)),
    "layers.moe.bias": (P(None, None), P(None, None)),
    "layers.moe.experts.gate": (
        P(None, "expert", ("data", "context"), "model"),
        P(None, "expert", None, "model"),
    ),
    "layers.moe.experts.down": (
        P(None, "expert", "model", ("data", "context")),
        P(None, "expert", "model", None),
    ),
    "layers.moe.shared.up": (P(None, FSDP, "model"), P(None, None, "model")),
    "dense.mlp.down": (P(None, "model", FSDP), P(None, "model", None)),
}


@pytest.mark.parametrize("name", PLANS)
def test_k2_stores_and_uses_by_the_plan(name):
    stored, used = PLANS[name]
    assert sharding.storage_spec(LEAVES[name].axes) == stored
    assert sharding.compute_spec(LEAVES[name].axes) == used


def test_what_would_rest_whole_for_want_of_an_expert_axis_is_split_over_data():
    with sharding.use_abstract_mesh(MeshConfig(data=8)):
        assert sharding.storage_spec(LEAVES["layers.attention.q_down"].axes) == P(
            None, "data", None
        )
        assert sharding.storage_spec(LEAVES["norm"].axes) == P(None)


def test_activations_are_split_over_every_axis_that_carries_tokens():
    assert micro_spec() == P(None, ("replica", "data", "expert"), "context")
    assert sharding.spec("batch") is None  # no mesh, no layout


def test_a_device_of_the_k2_mesh_rests_its_share_of_the_experts_and_a_little_more_of_the_rest():
    with sharding.use_abstract_mesh(K2.mesh):
        arrays = abstract(LEAVES)
    rests = {name: math.prod(a.sharding.shard_shape(a.shape)) for name, a in arrays.items()}
    experts = {name: n for name, n in rests.items() if ".experts." in name}
    share = sum(math.prod(arrays[name].shape) for name in experts) / K2.mesh.devices
    assert sum(experts.values()) == share
    assert 4 * sum(rests.values()) < 4.4e9  # bytes


def test_a_run_on_its_own_mesh_is_not_refused():
    for name in configs.NAMES:
        run = configs.load(name)
        sharding.check_divisible(specs(Kimi(run.model)), run.mesh.sizes, run.data.context)


REFUSED = [
    (MeshConfig(model=128), "'heads' (size 64) 128 ways over model; 64 would divide it"),
    (MeshConfig(data=3), "(size 7168) 3 ways over data; 2 or 4 would divide it"),
    (MeshConfig(expert=256), "'experts' (size 384) 256 ways over expert; 192 or 384 would"),
    (MeshConfig(data=5), "'embed' (size 7168) 5 ways over data; 4 or 7 would divide it"),
    (MeshConfig(context=7), "'length' (size 4096) 7 ways over context; 4 or 8 would divide it"),
]


@pytest.mark.parametrize(("mesh", "says"), REFUSED, ids=lambda value: str(value)[:12])
def test_a_mesh_that_does_not_divide_is_refused_in_one_line(mesh, says):
    with pytest.raises(ConfigError) as error:
        sharding.check_divisible(LEAVES, mesh.sizes, K2.data.context)
    assert says in str(error.value)
    assert str(error.value).startswith(f"mesh {mesh} splits ")
    assert "\n" not in str(error.value)


def test_a_mesh_of_more_devices_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="mesh data=3 model=4 takes 12 devices, there are 8;"):
        sharding.make_mesh(MeshConfig(data=3, model=4))


# Tracing takes seconds; the other releases have these shapes, and the small runs are really run.
TRACED = ("kimi_k2", "deepseek_v3", "moonlight_16b_a3b")
NAMES = [n if n in TRACED else pytest.param(n, marks=pytest.mark.slow) for n in configs.NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_full_size_traces_without_devices_and_keeps_every_layout(name):
    run = configs.load(name)
    with sharding.use_abstract_mesh(run.mesh) as mesh:
        program = build(run)
        state, batch = program.abstract_state(), program.abstract_batch()
        after, metrics = jax.eval_shape(program.step, state, batch)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))

    # Counts have no dims to lay out.
    def kept(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype, a.ndim and a.sharding.spec), tree)

    assert kept(after.params) == kept(state.params)
    assert kept(after.opt) == kept(state.opt)
    assert metrics["loss"].shape == ()
    layers = run.model.moe_layers + run.model.mtp_layers
    assert metrics["expert_load"].shape == (layers, run.model.experts)


def test_one_device_is_a_mesh_too():
    run = configs.load("kimi_k2")
    run = dataclasses.replace(run, mesh=MeshConfig())
    with sharding.use_abstract_mesh(run.mesh):
        program = build(run)
        after, _ = jax.eval_shape(program.step, program.abstract_state(), program.abstract_batch())
    assert after.params.keys() == LEAVES.keys()
