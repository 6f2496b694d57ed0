"""The optimizer alone at K2's shapes on 1,024 v5p chips: what the busiest chip does.

    python bench/optimizer_1t.py [CONFIG] [--compile] [--gram]

FLOPs of products and ring bytes sent are read from the traced program of one device, loops counted
as often as they run, branches by the dearer one: nothing is needed for that. `--compile` asks the
real TPU compiler (libtpu, no TPU) for the memory, on `v5p:8x8x16`. One JSON line.
"""

import argparse
import json
import math
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import optax
from jax.sharding import PartitionSpec as P

from k2jax.config import MESH_AXES, RunConfig
from k2jax.configs import load
from k2jax.model import Kimi
from k2jax.optim import muonclip
from k2jax.optim.newton_schulz import RESTARTS
from k2jax.params.arrays import abstract
from k2jax.params.declare import specs
from k2jax.params.route import newton_schulz_flops
from k2jax.sharding import mesh_over, use_abstract_mesh

TOPOLOGY = "v5p:8x8x16"


def program(run: RunConfig, gram: bool):
    """The update of every weight but the router biases, and its arguments on the mesh in use."""
    leaves = {n: leaf for n, leaf in specs(Kimi(run.model)).items() if leaf.group != "bias"}
    tx = muonclip(
        2e-4, specs=leaves, tau=run.optim.tau, nope=run.model.nope, gram=RESTARTS if gram else None
    )
    params = abstract(leaves)
    whole = jax.NamedSharding(jax.sharding.get_abstract_mesh(), P())
    tops = jax.ShapeDtypeStruct((run.model.layers, run.model.heads), "float32", sharding=whole)

    def update(params, grads, state, tops):
        updates, state = tx.update(grads, state, params, logit_max=tops)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(
        lambda a: a if a.sharding else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), state
    )
    return jax.jit(update, donate_argnums=(0, 1, 2)), (params, params, state, tops), leaves


def count(jaxpr, sizes: dict[str, int]) -> tuple[float, dict[str, float]]:
    """FLOPs of products and ring bytes sent by collective, of one device."""
    work, wire = 0.0, {}
    for eqn in jaxpr.eqns:
        name, times = eqn.primitive.name, 1
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval, eqn.outvars[0].aval
            work += 2.0 * math.prod(out.shape) * math.prod(left.shape[dim] for dim in contracted)
        axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
        if name in ("all_to_all", "all_gather", "psum", "psum_invariant"):
            n = math.prod(sizes[a] for a in (axes if isinstance(axes, tuple) else (axes,)))
            aval = eqn.invars[0].aval
            ring = {"all_to_all": (n - 1) / n, "all_gather": n - 1}.get(name, 2 * (n - 1) / n)
            wire[name] = wire.get(name, 0) + ring * math.prod(aval.shape) * aval.dtype.itemsize
        if name == "scan":
            times = eqn.params["length"]
        inner = [count(sub, sizes) for sub in _inside(eqn)]
        if name == "cond":
            inner = [max(inner, key=lambda both: both[0])]
        for more, sent in inner:
            work += times * more
            wire = {k: wire.get(k, 0) + times * sent.get(k, 0) for k in wire | sent}
    return work, wire


def _inside(eqn):
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def compiled(run: RunConfig, gram: bool) -> dict[str, float]:
    """Bytes a chip, by the TPU compiler."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    mesh = mesh_over(chips, run.mesh)
    with jax.set_mesh(mesh):
        step, args, _ = program(run, gram)
        began = time.perf_counter()
        done = step.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    memory = done.memory_analysis()
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Count, compile where asked, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="kimi_k2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gram", action="store_true")
    args = parser.parse_args()
    run = load(args.config)
    with use_abstract_mesh(run.mesh):
        step, shapes, leaves = program(run, args.gram)
        sizes = dict(zip(MESH_AXES, run.mesh.shape, strict=True))
        work, wire = count(step.trace(*shapes).jaxpr.jaxpr, sizes)
    share = sum(
        math.prod(leaf.stack) * newton_schulz_flops(*leaf.matrix)
        for leaf in leaves.values()
        if leaf.group == "muon"
    )
    share /= run.mesh.devices
    found = {
        "bench": "optimizer_1t",
        "config": run.name,
        "mesh": str(run.mesh),
        "gram": args.gram,
        "flops_per_device": work,
        "undivided_share": share,
        "ratio": round(work / share, 4),
        "wire_bytes_per_device": {k: round(v) for k, v in wire.items()},
        "wire_bytes": round(sum(wire.values())),
    }
    if args.compile:
        found |= compiled(run, args.gram)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
