"""What is planned of Newton-Schulz against the traced optimizer, collective by collective."""

import collections
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from k2jax import configs, sharding
from k2jax.config import MeshConfig, override
from k2jax.model import Kimi
from k2jax.optim.muon import scale_by_muon
from k2jax.params.declare import specs
from k2jax.planner import network, newton
from k2jax.planner.step_flops import Case
from k2jax.sharding.table import split

KINDS = {"all_to_all": "all-to-all", "all_gather": "all-gather", "psum": "all-reduce"}


def traced(run, mesh):
    """Collectives of Muon's update, as `plan` counts them."""
    leaves = {name: leaf for name, leaf in specs(Kimi(run.model)).items() if leaf.group == "muon"}
    tx = scale_by_muon(leaves, dtype=run.optim.ns_dtype)
    with sharding.use_abstract_mesh(mesh):

        def at_rest(leaf):
            return PartitionSpec(*(split(axis, mesh.sizes) for axis in leaf.axes))

        def shape(leaf):
            return jax.ShapeDtypeStruct(
                leaf.shape,
                jnp.float32,
                sharding=NamedSharding(jax.sharding.get_abstract_mesh(), at_rest(leaf)),
            )

        weights = {name: shape(leaf) for name, leaf in leaves.items()}
        state = jax.eval_shape(tx.init, weights)
        state = state._replace(momentum=weights)
        jaxpr = jax.make_jaxpr(tx.update)(weights, state)
    return walked(jaxpr.jaxpr, mesh)


def walked(jaxpr, mesh):
    """Bytes sent by a program; of branches, those of the one that sends most."""
    wire = collections.Counter()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        kind = KINDS.get(name.removesuffix("_invariant"))
        if kind:
            axes = params.get("axis_name") or params.get("axes")
            axes = (axes,) if isinstance(axes, str) else axes
            arrays = (*eqn.invars, *eqn.outvars)
            size = max(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in arrays)
            found: network.Wire = {}
            network.add(found, kind, axes, mesh, size)
            wire.update(
                {(kind, over): sent for row in found.values() for over, sent in row.items()}
            )
        times = params.get("length", 1) if name == "scan" else 1
        branches = [walked(b.jaxpr, mesh) for b in params.get("branches", ())]
        if branches:
            wire.update(max(branches, key=lambda found: found.total()))
        for key in ("jaxpr", "call_jaxpr"):
            if key in params:
                inner = walked(getattr(params[key], "jaxpr", params[key]), mesh)
                wire.update({what: times * sent for what, sent in inner.items()})
    return wire


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("tiny", MeshConfig(expert=8)),
        ("tiny", MeshConfig(data=2, expert=2, model=2)),
        ("tiny", MeshConfig(data=4, context=2)),
        ("small", MeshConfig(context=2, model=4)),
        ("small", MeshConfig(data=2, expert=4)),
        ("small", MeshConfig(replica=2, data=2, expert=2)),
        ("moonlight_16b_a3b", MeshConfig(data=4, context=2, model=4)),
        ("moonlight_16b_a3b", MeshConfig(expert=16, context=2)),
        ("kimi_k2", MeshConfig(data=8, expert=128)),
        ("kimi_k2", MeshConfig(data=8, expert=16, model=8)),
        ("deepseek_v3", MeshConfig(expert=64, model=16)),
    ],
)
def test_the_exchange_of_matrices_is_planned_byte_by_byte(name, mesh):
    run = override(configs.load(name), {"optim.name": "muonclip"})
    planned = newton.optimizer_wire(Case(run, mesh, 1))
    flat = {(kind, axes): sent for kind, row in planned.items() for axes, sent in row.items()}
    # Norms of shared matrices are summed too: some bytes.
    found = {what: sent for what, sent in traced(run, mesh).items() if sent > 100}
    assert flat.keys() == found.keys()
    for key, sent in flat.items():
        assert sent == pytest.approx(found[key], rel=1e-9), key
