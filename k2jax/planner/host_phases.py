"""What one host does in a run, in bytes and seconds: counted for a target, timed for a slice here.

Rates that nobody can measure here are stated, and printed with the table.
"""

import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from k2jax.checkpoint import Checkpoints
from k2jax.checkpoint.integrity import BLOCK
from k2jax.config import RunConfig
from k2jax.data import Batches, Store
from k2jax.params.arrays import draw_matrix
from k2jax.params.spec import ParamSpec
from k2jax.planner.compiler import place_on
from k2jax.planner.targets import Target
from k2jax.sharding import storage_spec
from k2jax.training.metrics import LOADS, to_line
from k2jax.training.step import Program

# Stated, not measured: bytes a second of a host.
STORAGE = 2e9  # of a shared file system or a bucket, each way
TO_DEVICES = 25e9  # from its memory to those of its devices
CORES = 64  # that work on it
SLICE = 2**26  # bytes that are saved and restored here
Place = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Something that a host does.

    Attributes:
        name: of it.
        times: how often in the run.
        size: bytes that a host reads, writes or makes, each time.
        seconds: each time.
        memory: bytes of the host's memory at its worst moment.
        how: where the seconds come from.
    """

    name: str
    times: int
    size: float
    seconds: float
    memory: float
    how: str


def devices_per_host(target: Target) -> int:
    """Devices, as jax counts them, of a host: 4 chips of a TPU, a node of GPUs."""
    if target.chip.kind == "tpu":
        return min(4 * target.chip.devices, target.devices)
    return target.shape[-1]


def count_phases(
    program: Program,
    target: Target,
    mesh: jax.sharding.Mesh,
    begins_with: str,
    step_seconds: float,
) -> list[Phase]:
    """Count what a host of a target does in a run.

    Args:
        program: of the run.
        target: the machines.
        mesh: of the target's devices, in use.
        begins_with: a stage whose weights the run starts from; empty: they are drawn.
        step_seconds: of a step, as planned.
    """
    per_host = devices_per_host(target)
    hosts = target.devices // per_host
    devices = _devices_of_a_host(mesh, per_host)
    state = place_on(mesh, program.abstract_state())
    writes, checks, reads = _time_checkpoint()
    params, whole = (host_bytes(tree, devices) for tree in (state.params, state))
    copies = sum(_device_bytes(tree) * per_host for tree in (state.params, state.opt))
    share = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)) / hosts
    restore = Phase(
        "restore a checkpoint",
        1,
        whole,
        max(whole / STORAGE, whole / (reads * CORES)) + whole / TO_DEVICES,
        whole,
        f"{STORAGE / 1e9:g} GB/s of storage; a core here restores {reads / 1e9:.2f} GB/s",
    )
    if begins_with:
        begin = dataclasses.replace(
            restore,
            name=f"read the weights of {begins_with}",
            size=params,
            seconds=params / restore.size * restore.seconds,
            memory=params,
        )
    else:
        begin = count_drawing(program.specs, mesh, devices)
    run = program.run
    return [
        begin,
        feeding := _feeding(run, hosts),
        _scoring(run, hosts, feeding),
        count_metrics(program),
        Phase(
            "save a checkpoint",
            math.ceil(run.train.steps / run.train.save_every),
            share,
            max(share / STORAGE, share / (writes * CORES)),
            copies,
            f"{STORAGE / 1e9:g} GB/s of storage, in the background; a core here writes and"
            f" reads again {writes / 1e9:.2f} GB/s; {_describe_saves(run, step_seconds)}"
            f" {share * hosts / 1e12:.3g} TB from all hosts",
        ),
        Phase(
            "check a checkpoint",
            1,
            share,
            max(share / STORAGE, share / (checks * CORES)),
            CORES * BLOCK,
            f"its share, before a restore; a core here sums up {checks / 1e9:.2f} GB/s",
        ),
        restore,
    ]


def _describe_saves(run: RunConfig, step_seconds: float) -> str:
    """Say what is lost with a host, and how many saves the storage holds."""
    steps, keep_every = run.train.steps, run.train.keep_every
    hours = min(run.train.save_every, steps) * step_seconds / 3600
    # One more is there while the next one is written.
    kept = run.train.keep + 1 + (steps // keep_every if keep_every else 0)
    return f"a lost host costs up to {hours:.2g} hours of steps; storage for {kept} of"


def _devices_of_a_host(mesh: jax.sharding.Mesh, count: int) -> list[Any]:
    """Return those of the first host, or where the compiler knows no hosts, the first ones."""
    devices = list(mesh.devices.flat)
    own = [d for d in devices if d.process_index == devices[0].process_index]
    return own if len(own) == count else devices[:count]


def host_bytes(tree: Any, devices: list[Any]) -> float:
    """Bytes of the parts that devices of a host store, each part once."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        places = _places(leaf.sharding, leaf.shape, devices)
        total += sum(math.prod(b - a for a, b in place) for place in places) * leaf.dtype.itemsize
    return float(total)


def _places(sharding: Any, shape: tuple[int, ...], devices: list[Any]) -> set[Place]:
    cuts = sharding.devices_indices_map(shape)
    return {
        tuple(cut.indices(n)[:2] for cut, n in zip(cuts[device], shape, strict=True))
        for device in devices
    }


def _device_bytes(tree: Any) -> float:
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def count_drawing(
    specs: Mapping[str, ParamSpec], mesh: jax.sharding.Mesh, devices: list[Any]
) -> Phase:
    """Count what a host draws and stores of new weights; `devices` are its own."""
    stored = memory = 0.0
    for leaf in specs.values():
        places, matrices = _own_parts(leaf, mesh, devices)
        own = 4.0 * sum(math.prod(b - a for a, b in place) for place in places)
        stored += own
        at_once = 4.0 * min(CORES, matrices) * math.prod(leaf.shape[leaf.stacked :])
        memory = max(memory, own + at_once)
    drawn, rate = count_drawn(specs, mesh, devices), _time_drawing(specs)
    return Phase(
        "draw the weights",
        1,
        stored,
        drawn / (rate * CORES) + stored / TO_DEVICES,
        memory,
        f"{drawn / 1e9:,.3g}G numbers; a core here draws {rate / 1e6:.0f}M a second",
    )


def count_drawn(specs: Mapping[str, ParamSpec], mesh: jax.sharding.Mesh, devices: list[Any]) -> int:
    """Count the numbers that `initial` draws on a host: matrices whole if a part is its own."""
    return sum(
        _own_parts(leaf, mesh, devices)[1] * math.prod(leaf.shape[leaf.stacked :])
        for leaf in specs.values()
        if leaf.init == "normal"
    )


def _own_parts(
    leaf: ParamSpec, mesh: jax.sharding.Mesh, devices: list[Any]
) -> tuple[set[Place], int]:
    """Return the places of a host's parts in a parameter, and how many matrices they meet."""
    layout = jax.NamedSharding(mesh, storage_spec(leaf.axes))
    places = _places(layout, leaf.shape, devices)
    stacks = (itertools.product(*(range(a, b) for a, b in p[: leaf.stacked])) for p in places)
    return places, len(set(itertools.chain.from_iterable(stacks)))


def _time_drawing(specs: Mapping[str, ParamSpec]) -> float:
    """Numbers a second of one core, by a slice of the largest matrix."""
    largest = max(
        (leaf.shape[leaf.stacked :] for leaf in specs.values() if leaf.init == "normal"),
        key=math.prod,
    )
    shape = (min(largest[0], max(1, SLICE // 4 // max(1, math.prod(largest[1:])))), *largest[1:])
    return math.prod(shape) / _seconds(lambda: draw_matrix(0, "slice", (0,), shape, 0.02))


def _feeding(run: RunConfig, hosts: int) -> Phase:
    """Rows of a batch: cut from the tokens, shuffled, and copied to the devices."""
    rows, context = max(1, run.data.rows // hosts), run.data.context
    batch = 20.0 * rows * context  # five arrays of 32 bits
    few = max(1, min(rows, 2**18 // context))
    tokens = np.resize(np.arange(1, 512, dtype=np.int32), 4 * few * context)
    store = Store(tokens, np.arange(0, len(tokens) + 1, context // 4), len(tokens))
    batches = Batches(store, few, context, 0)
    batches.batch(0)
    rate = few * context / _seconds(lambda: batches.batch(1))
    return Phase(
        "make a batch",
        run.train.steps,
        batch,
        rows * context / rate + batch / TO_DEVICES,
        4 * batch,  # two ahead, one on its way, one in use
        f"{rows:,} rows of {context:,} tokens; a core here makes {rate / 1e6:.1f}M tokens a second;"
        f" {4 * run.train.steps * run.data.rows * context / 1e9:,.0f} GB of tokens over the run",
    )


def _scoring(run: RunConfig, hosts: int, feeding: Phase) -> Phase:
    """Held-out rows, in batches of a micro-batch's size."""
    micro = run.data.rows // run.train.accumulate
    batches = -(-run.train.eval_rows // micro)
    share = batches * micro / max(run.data.rows, 1)
    return Phase(
        "make held-out rows",
        math.ceil(run.train.steps / run.train.eval_every) if run.train.eval_every else 1,
        share * feeding.size,
        share * feeding.seconds,
        feeding.memory,
        f"{run.train.eval_rows:,} rows in {batches:,} batches of {micro:,}; all of them at the end",
    )


def count_metrics(program: Program) -> Phase:
    """Lines of `metrics.jsonl`, with the loads of all experts in every so many."""
    run = program.run
    _, shapes = jax.eval_shape(program.step, program.abstract_state(), program.abstract_batch())
    rng = np.random.default_rng(0)
    tokens = run.data.rows * run.data.context * run.model.experts_per_token / run.model.experts
    values: dict[str, Any] = {
        name: rng.random(s.shape).astype(np.float32).tolist() for name, s in shapes.items()
    }
    values[LOADS] = rng.poisson(min(tokens, 1e9), shapes[LOADS].shape).tolist()
    more = ("learning_rate", "seconds", "input_seconds", "tokens_per_second", "mfu", "host_bytes")
    values |= dict.fromkeys(more, 0.1234567)
    short, full = (len(json.dumps(to_line(1, values, loads))) + 1 for loads in (False, True))
    mean = short + (full - short) / run.train.loads_every
    return Phase(
        "write a line of metrics",
        run.train.steps,
        mean,
        _seconds(lambda: json.dumps(to_line(1, values))),
        full,
        f"{short:,} bytes, {full:,} every {run.train.loads_every} steps;"
        f" {run.train.steps * mean / 1e9:.2f} GB over the run",
    )


def _time_checkpoint() -> tuple[float, float, float]:
    """Bytes a second that one core writes, reading them again, sums up, and restores."""
    array = np.arange(SLICE // 4, dtype=np.float32).reshape(-1, 1024)
    with (
        jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.local_devices(backend="cpu")[:1])),
        tempfile.TemporaryDirectory(prefix="k2jax-") as folder,
        Checkpoints(folder) as saved,
    ):
        layout = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
        state = {"params": {"slice": jax.device_put(array, layout)}}

        def save() -> None:
            saved.save(1, state, {})
            saved.wait()

        wanted = {
            "params": {"slice": jax.ShapeDtypeStruct(array.shape, "float32", sharding=layout)}
        }
        return (
            SLICE / _cpu_seconds(save),
            SLICE / _cpu_seconds(lambda: saved.check(1)),
            SLICE / _cpu_seconds(lambda: saved.restore(1, wanted)),
        )


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return max(time.perf_counter() - began, 1e-9)


def _cpu_seconds(action: Callable[[], Any]) -> float:
    """Of all threads: a host has the cores for them."""
    began = time.process_time()
    action()
    return max(time.process_time() - began, 1e-9)
