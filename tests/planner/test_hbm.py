"""What is planned to be kept for the backward pass against what tracing says is kept."""

import math

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from k2jax import configs, sharding
from k2jax.config import MeshConfig, override
from k2jax.ops.limits import LOGITS_BYTES
from k2jax.params.kimi import declare_kimi
from k2jax.planner import hbm as memory
from k2jax.planner.partition import count_shards, device_size
from k2jax.planner.step_flops import Case
from k2jax.training.step import build


def kept(run, mesh):
    """Bytes on a device of all that the backward pass is given."""
    with sharding.use_abstract_mesh(mesh):
        program = build(run)
        params, batch = program.abstract_state().params, program.abstract_batch()

        def place(a):
            return NamedSharding(
                jax.sharding.get_abstract_mesh(), PartitionSpec(*a.sharding.spec[1:])
            )

        micro = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=place(a)), batch
        )
        micro = micro._replace(total=jax.ShapeDtypeStruct((), "float32"))
        biases = {name for name in params if program.specs[name].group == "bias"}
        fixed = {name: params.pop(name) for name in biases}

        def loss(params, fixed, micro):
            return program.objective(params | fixed, micro)[0]

        def backward(*args):
            return jax.vjp(lambda p: loss(p, *args[1:]), args[0])[1]

        arrays = jax.tree.leaves(jax.eval_shape(backward, params, fixed, micro))

        def here(a):
            return a.sharding.shard_shape(a.shape) if a.sharding else a.shape

        return sum(math.prod(here(a)) * a.dtype.itemsize for a in arrays)


@pytest.mark.parametrize(
    ("name", "mesh", "more"),
    [
        ("tiny", MeshConfig(expert=8), {}),
        ("tiny", MeshConfig(expert=8), {"train.dispatch": "alltoall"}),
        ("small", MeshConfig(data=2, context=4), {}),
        ("small", MeshConfig(data=2, expert=4), {"train.dtype": "bfloat16"}),
        ("small", MeshConfig(context=2, model=4), {}),
        ("moonlight_16b_a3b", MeshConfig(expert=32), {"train.remat": "none"}),
    ],
)
def test_what_is_kept_where_nothing_is_made_again(name, mesh, more):
    rows = str(mesh.data * mesh.expert)
    run = override(configs.load(name), {"data.rows": rows, "train.accumulate": "1"} | more)
    case = Case(run, mesh, 1)
    planned = memory.activations(case)
    for leaf in declare_kimi(run.model).values():  # the rest of the weights is kept as it rests
        used = (
            count_shards(leaf, mesh, gathered=True) == count_shards(leaf, mesh)
            and run.train.dtype == "float32"
        )
        if leaf.contracted and ("experts" not in leaf.axes or used):
            planned += 4 * device_size(leaf, mesh)
    if not case.exchanges:  # tracing counts what a CPU's way keeps too: what gate and up gave
        planned += 2 * case.width * case.mixtures * case.pairs * case.hidden
    if case.logits <= LOGITS_BYTES:  # planned as the head's
        planned += 2.25 * case.logits
    # Norms, masks and padding are not planned.
    assert planned == pytest.approx(kept(run, mesh), rel=0.07)


def test_gpus_turn_the_weights_whose_gathered_side_is_not_their_first():
    run = override(configs.load("kimi_k2"), {"data.rows": "1024", "train.accumulate": "1"})
    specs, mesh = declare_kimi(run.model), MeshConfig(data=8, expert=128)
    turned = sum(
        4 * device_size(specs[f"layers.{name}"], mesh)
        for name in (
            *(f"moe.experts.{matrix}" for matrix in ("gate", "up", "down")),
            "moe.shared.down",
            "attention.out",
        )
    )
    moments = memory.moments(Case(run, mesh, 1, "gpu"))
    assert moments["layers"]["turned weights"] == moments["head"]["turned weights"] == turned
    whole = memory.moments(Case(run, MeshConfig(model=8), 1, "gpu"))
    assert "turned weights" not in whole["layers"]  # nothing is gathered
    for chip in ("cpu", "tpu"):
        assert "turned weights" not in memory.moments(Case(run, mesh, 1, chip))["layers"]
