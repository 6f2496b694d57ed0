"""The formula of a step's operations against a count in the traced program."""

import math

import jax
import pytest
from jax.interpreters import partial_eval

from k2jax import configs
from k2jax.config import MeshConfig, override
from k2jax.planner import step_flops as work
from k2jax.planner.step_flops import Case
from k2jax.training.step import build

ONE_DEVICE = {
    "model.moe_layers": "3",
    "model.vocab": "512",
    "data.rows": "2",
    "optim.name": "adamw",
    "mesh.data": "1",
    "mesh.expert": "1",
    "mesh.model": "1",
}


def products(jaxpr) -> float:
    """Operations of all products, loops times their length; a grouped product takes a row once."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "ragged_dot_general"):
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            if name == "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                groups = 1
            else:
                layout = params["ragged_dot_dimension_numbers"]
                (contracted, _), _ = layout.dot_dimension_numbers
                # Groups that share out the summed rows give a matrix each.
                groups = out[0] if layout.lhs_ragged_dimensions[0] in contracted else 1
            total += 2 * math.prod(out) * math.prod(left[i] for i in contracted) / groups
        elif name == "scan":
            total += params["length"] * products(params["jaxpr"].jaxpr)
        elif name == "cond":  # of platforms; the last is what devices but CPUs take
            total += products(params["branches"][-1].jaxpr)
        else:
            inner = [getattr(value, "jaxpr", value) for value in params.values()]
            total += sum(products(value) for value in inner if hasattr(value, "eqns"))
    return total


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_a_step_computes_what_the_formula_counts(remat):
    run = override(configs.load("tiny"), ONE_DEVICE | {"train.remat": remat})
    program = build(run)
    params, batch = program.abstract_state().params, program.abstract_batch()
    micro = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)
    micro = micro._replace(total=jax.ShapeDtypeStruct((), "float32"))
    fixed = {name: params.pop(name) for name in list(params) if name.endswith("bias")}

    def loss(params, fixed, micro):
        return program.objective(params | fixed, micro)[0]

    traced = jax.make_jaxpr(jax.grad(loss))(params, fixed, micro).jaxpr
    used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    assert products(used) == work.step_flops(Case(run, MeshConfig(), 1))
