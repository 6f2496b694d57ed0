"""What is planned to be kept for the backward pass against what tracing says is kept."""

import math

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from k2jax import configs, sharding
from k2jax.config import MeshConfig, override
from k2jax.plan import memory
from k2jax.plan.inventory import leaves, size, ways
from k2jax.plan.work import Case
from k2jax.step import build


def kept(run, mesh):
    """Bytes on a device of all that the backward pass is given."""
    with sharding.pretend(mesh):
        program = build(run)
        params, batch = program.abstract_state().params, program.abstract_batch()
        place = lambda a: NamedSharding(
            jax.sharding.get_abstract_mesh(), PartitionSpec(*a.sharding.spec[1:])
        )
        micro = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=place(a)), batch
        )
        biases = {name for name in params if program.specs[name].group == "bias"}
        fixed = {name: params.pop(name) for name in biases}
        loss = lambda params, fixed, micro: program._loss(params, fixed, micro, 1.0)[0]
        backward = lambda *args: jax.vjp(lambda p: loss(p, *args[1:]), args[0])[1]
        arrays = jax.tree.leaves(jax.eval_shape(backward, params, fixed, micro))
        here = lambda a: a.sharding.shard_shape(a.shape) if a.sharding else a.shape
        return sum(math.prod(here(a)) * a.dtype.itemsize for a in arrays)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("tiny", MeshConfig(expert=8)),
        ("small", MeshConfig(data=2, context=4)),
        ("small", MeshConfig(data=2, expert=4)),
        ("small", MeshConfig(context=2, model=4)),
    ],
)
def test_what_is_kept_where_nothing_is_made_again(name, mesh):
    rows = str(mesh.data * mesh.expert)
    run = override(configs.load(name), {"data.rows": rows, "train.accumulate": "1"})
    case = Case(run, mesh, 1)
    used = [leaf for leaf in leaves(run.model).values() if leaf.contracted]
    as_they_rest = [leaf for leaf in used if ways(leaf, mesh) == ways(leaf, mesh, gathered=True)]
    arguments = sum(4 * size(leaf) / ways(leaf, mesh) for leaf in as_they_rest)
    logits = 2.25 * case.logits  # planned as the head's
    # Norms, masks and padding are not planned.
    planned = memory.activations(case) + arguments + logits
    assert planned == pytest.approx(kept(run, mesh), rel=0.05)
