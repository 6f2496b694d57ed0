"""A rehearsal of a run: every program compiled for a target, every phase of a host counted.

The programs are those that `train` itself lists; a small run on this machine shows whether there is
one that is in no list.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from k2jax import configs
from k2jax.config import ConfigError, MeshConfig, RunConfig
from k2jax.inference import forward as network
from k2jax.inference import sampler
from k2jax.model.kernel_check import KernelCheck, list_checks
from k2jax.params.arrays import abstract
from k2jax.params.kimi import declare_kimi
from k2jax.planner.compile_call import compile_call
from k2jax.planner.compiler import (
    Compiled,
    DoesNotFitError,
    compile_on,
    compile_program,
    devices_of,
    place_on,
)
from k2jax.planner.decoding import Call
from k2jax.planner.host_phases import Phase, count_phases, devices_per_host
from k2jax.planner.miniature import rehearse_small, require_listed, shrink_mesh
from k2jax.planner.targets import Target
from k2jax.runtime import backend
from k2jax.sharding import check_divisible, mesh_over, use_abstract_mesh
from k2jax.training.compile import PROGRAMS
from k2jax.training.step import Program, build

# A call of the network, and what picks tokens from its logits, which adds nothing to its peak.
SAMPLING = frozenset(name for name, f in vars(sampler).items() if hasattr(f, "lower")) | {"run"}
SAMPLE_CONTEXT, SAMPLE_BLOCK = 128, 16  # tokens of the sample at the end, and of a prompt's chunk


class Listed(NamedTuple):
    """A program of the run.

    Attributes:
        name: in the table.
        functions: names of the functions in XLA's log that are this program.
        compile: compiles it; bytes on a device that are no argument of it, too.
    """

    name: str
    functions: frozenset[str]
    compile: Callable[[], tuple[Compiled, float]]


def rehearse(
    run: RunConfig,
    target: Target,
    step_seconds: float,
    closing: Callable[[Any], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Rehearse a run: `programs`, `host` and `fits`, as `k2jax plan --rehearse --json` has them.

    Args:
        run: on the mesh of the target.
        target: the machines.
        step_seconds: of a step, as planned.
        closing: what `train` does with the trained model.
        say: called with a line when a program is about to be compiled.

    Raises:
        ConfigError: a program of the run was left out, the small run fails, or a compiler is
            missing.
    """
    before = stage_before(run)
    backend.prepare(max(shrink_mesh(r.mesh).devices for r in (run, before or run)))
    programs = list(list_programs(run, target))
    names = rehearse_small(run, before, closing)
    require_listed(names, frozenset().union(*(p.functions for p in programs)))
    rows = []
    for listed in programs:
        say(f"compiling for {target.name}: {listed.name}")
        rows.append(_compile(listed, target))
    with jax.set_mesh(mesh := mesh_over(devices_of(target)[: run.mesh.devices], run.mesh)):
        begins_with = before.name if before else ""
        phases = count_phases(build(run), target, mesh, begins_with, step_seconds)
    host = [_describe_phase(phase, target) for phase in [*phases, _compiling(rows)]]
    return {
        "programs": rows,
        "host": host,
        "fits": all(row["fits"] for row in (*rows, *host)),
        "compiled_by_a_small_run": sorted(names),
    }


def stage_before(run: RunConfig) -> RunConfig | None:
    """Return the stage of the recipe whose weights a run starts from; None: it draws its own."""
    stages = configs.RECIPE
    at = stages.index(run.name) if run.name in stages else 0
    return configs.load(stages[at - 1]) if at else None


def list_programs(run: RunConfig, target: Target) -> Iterator[Listed]:
    """List what a run compiles, in the order of its first use."""
    yield from _list_checks(run, target)
    for name in PROGRAMS:
        yield _list_program(name, run, target)
    yield from _list_sample(run, target)


def _list_program(name: str, run: RunConfig, target: Target) -> Listed:
    def compile_it() -> tuple[Compiled, float]:
        return compile_program(name, run, target), _count_bytes(run, PROGRAMS[name].beside)

    function = PROGRAMS[name].function(build(run))
    return Listed(name, frozenset({function.__name__}), compile_it)


def _list_checks(run: RunConfig, target: Target) -> Iterator[Listed]:
    """List the comparisons of kernels with their references; nothing else is there yet."""
    if target.chip.kind == "cpu":
        return
    program = build(run)

    def checks() -> list[KernelCheck]:
        return list_checks(program.dispatch, run.model, run.data.context)

    with jax.set_mesh(mesh_over(devices_of(target)[: run.mesh.devices], run.mesh)):
        names = [check.name for check in checks()]

    def compile_it(number: int) -> tuple[Compiled, float]:
        def trace(mesh: Any) -> Any:
            check = checks()[number]
            arrays = place_on(mesh, jax.eval_shape(check.draw))
            return jax.jit(check.kernel_errors).trace(*arrays)

        return compile_on(target, run.mesh, trace), 0.0

    for number, name in enumerate(names):
        compiles = functools.partial(compile_it, number)
        yield Listed(f"check of {name}", frozenset({"kernel_errors"}), compiles)


def _list_sample(run: RunConfig, target: Target) -> Iterator[Listed]:
    """List what continues a prompt at the end: beside the state, and the weights once more."""
    mesh, dtype = sample_mesh(run), run.train.dtype
    cfg = dataclasses.replace(run.model, mtp_layers=0)

    def state_bytes() -> float:
        return _count_bytes(run, _describe_state_and_cast)

    def split() -> tuple[Compiled, float]:
        def trace(there: Any) -> Any:
            params = place_on(there, abstract(declare_kimi(cfg), dtype))
            return jax.jit(network.split_weights, static_argnums=1).trace(params, cfg)

        return compile_on(target, mesh, trace, inference=True), state_bytes()

    def compile_it(call: Call) -> tuple[Compiled, float]:
        return compile_call(call, dtype), state_bytes()

    # Each weight is laid out for inference by a copy, which is an argument here.
    functions = frozenset({"_device_put_reshard", "split_weights"})
    yield Listed("sample: order the weights", functions, split)
    for name, tokens in (("read the prompt", SAMPLE_BLOCK), ("decode", 1)):
        call = Call(cfg, mesh, target, mesh.devices, tokens, SAMPLE_CONTEXT)
        yield Listed(f"sample: {name}", SAMPLING, functools.partial(compile_it, call))


def _describe_state_and_cast(program: Program) -> Any:
    state = program.abstract_state()
    cast = program.run.train.dtype != "float32"
    return state, jax.eval_shape(program.cast, state.params) if cast else ()


def sample_mesh(run: RunConfig) -> MeshConfig:
    """Return the mesh that a run's model is sampled on: see `sharding.inference_mesh`."""
    mesh = run.mesh
    joined = mesh.data * mesh.context
    for axis in ("model", "replica"):
        sizes = {a: mesh.sizes[a] for a in ("replica", "expert", "model")}
        sizes[axis] *= joined
        try:
            check_divisible(declare_kimi(run.model), sizes)
        except ConfigError:
            continue
        return MeshConfig(**sizes)
    raise ConfigError(f"no mesh for inference divides {run.name}")


def _count_bytes(run: RunConfig, describe: Callable[[Program], Any]) -> float:
    """Count a device's bytes of abstract arrays."""
    with use_abstract_mesh(run.mesh):
        leaves = jax.tree.leaves(describe(build(run)))
    sizes = (math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    return float(sum(sizes))


def _compile(listed: Listed, target: Target) -> dict[str, Any]:
    try:
        compiled, beside = listed.compile()
    except DoesNotFitError as error:
        return {"name": listed.name, "fits": False, "why": str(error)}
    total = compiled.memory["peak"] + beside
    return {
        "name": listed.name,
        "fits": total <= target.hbm,
        "bytes_per_device": compiled.memory,
        "beside_bytes": beside,
        "total_bytes": total,
        "compile_seconds": compiled.seconds,
        "host_peak_bytes": compiled.host_peak,
    }


def _compiling(rows: list[dict[str, Any]]) -> Phase:
    done = [row for row in rows if "compile_seconds" in row]
    return Phase(
        "compile the programs",
        1,
        0.0,
        sum(row["compile_seconds"] for row in done),
        max((row["host_peak_bytes"] for row in done), default=0.0),
        "as they took here",
    )


def _describe_phase(phase: Phase, target: Target) -> dict[str, Any]:
    limit = target.chip.host * devices_per_host(target) / target.chip.devices
    return {
        "name": phase.name,
        "fits": phase.memory <= limit,
        "times": phase.times,
        "bytes": phase.size,
        "seconds": phase.seconds,
        "memory_bytes": phase.memory,
        "memory_limit_bytes": limit,
        "how": phase.how,
    }
