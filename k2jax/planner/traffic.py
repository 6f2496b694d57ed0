"""Bytes that a device sends in a training step, by kind of collective and mesh axes."""

from k2jax.params.kimi import declare_kimi
from k2jax.params.spec import ParamSpec
from k2jax.planner import network
from k2jax.planner.network import Wire
from k2jax.planner.partition import device_size, shard_axes
from k2jax.planner.step_flops import Case
from k2jax.sharding.table import BATCH


def step_wire(case: Case) -> Wire:
    """Everything but the optimizer's exchange."""
    wire: Wire = {}
    for leaf in declare_kimi(case.model).values():
        if leaf.group != "bias" and leaf.contracted:
            _weight(case, leaf, wire)
    _embedding(case, declare_kimi(case.model)["embed"], wire)
    _activations(case, wire)
    _experts(case, wire)
    return wire


def _weight(case: Case, leaf: ParamSpec, wire: Wire) -> None:
    """Gathered before use over what only stores it; its gradient is scattered back and summed.

    Outside of scanned layers nothing is gathered twice: what was gathered is kept.
    """
    mesh, add = case.mesh, network.add
    used, stored = shard_axes(leaf, mesh, gathered=True), shard_axes(leaf, mesh)
    over = [axis for axis in stored if axis not in used]
    scanned = any(axis.endswith("_layers") for axis in leaf.axes)
    times = case.accumulate * (case.gathers if scanned else 1)
    whole = case.width * device_size(leaf, mesh, gathered=True)
    add(wire, "all-gather", over, mesh, times * whole)
    wider = case.accumulate * case.grad_width / case.width
    add(wire, "reduce-scatter", over, mesh, wider * whole)
    _summed(case, leaf, wire)


def _summed(case: Case, leaf: ParamSpec, wire: Wire) -> None:
    """A gradient, over devices with other tokens and the same part of the weight."""
    rest = [axis for axis in (*BATCH, "context") if axis not in shard_axes(leaf, case.mesh)]
    part = case.accumulate * case.grad_width * device_size(leaf, case.mesh)
    network.add(wire, "all-reduce", rest, case.mesh, part)


def _embedding(case: Case, leaf: ParamSpec, wire: Wire) -> None:
    """Rows looked up, from devices that have other columns of them, and their gradients."""
    rows = case.predictions * case.accumulate * case.tokens * case.model.embed * case.width
    used = shard_axes(leaf, case.mesh, gathered=True)
    over = [axis for axis in shard_axes(leaf, case.mesh) if axis not in used]
    network.add(wire, "all-to-all", over, case.mesh, 2 * rows)
    network.add(wire, "all-reduce", list(used), case.mesh, rows)
    _summed(case, leaf, wire)


def _activations(case: Case, wire: Wire) -> None:
    """Sums over `model` where a split width was contracted; heads exchanged over `context`.

    Sums are of float32 accumulators. Forward, each layer sums what attention and the shared
    expert give; backward, the gradients of what queries, keys and hidden widths were made from.
    """
    cfg, mesh, add = case.model, case.mesh, network.add
    tokens = case.tokens * case.accumulate
    times = case.gathers
    mlps = cfg.dense_layers + (case.mixtures if cfg.shared_experts else 0)
    row = 4 * tokens * cfg.embed
    forward = row * (case.layers + mlps)
    low = cfg.q_rank or cfg.embed
    backward = 4 * tokens * case.layers * (low + cfg.kv_rank + cfg.rope) + 2 * row * mlps
    head = case.predictions * row  # gradient of what it reads
    add(wire, "all-reduce", ["model"], mesh, times * forward + backward + head)
    # Queries, keys and values to devices that have their head's whole rows; what is mixed, back.
    heads = 2 * cfg.heads / mesh.model * (cfg.nope + cfg.rope + cfg.value)
    rows = case.width * tokens * case.layers * heads
    add(wire, "all-to-all", ["context"], mesh, (times + 1) * rows)


def _experts(case: Case, wire: Wire) -> None:
    """Tokens to their experts and back, forward, again for the backward pass, and backward."""
    cfg, mesh, add = case.model, case.mesh, network.add
    tokens = case.tokens * case.accumulate
    rows = case.mixtures * case.width * tokens * cfg.embed
    if not case.exchanges:
        whole = rows * mesh.expert
        add(wire, "all-gather", ["expert"], mesh, (case.gathers + 1) * whole)
        add(wire, "reduce-scatter", ["expert"], mesh, 2 * whole)
    else:
        pairs = rows * cfg.experts_per_token
        add(wire, "all-to-all", ["expert"], mesh, (case.gathers + 3) * pairs)
    add(wire, "all-reduce", ["model"], mesh, 2 * rows)


def total(wire: Wire) -> float:
    """All bytes."""
    return sum(sum(row.values()) for row in wire.values())


def merged(*wires: Wire) -> Wire:
    """Sums by kind and axes."""
    both: Wire = {}
    for wire in wires:
        for kind, row in wire.items():
            for axes, sent in row.items():
                here = both.setdefault(kind, {})
                here[axes] = here.get(axes, 0.0) + sent
    return both
