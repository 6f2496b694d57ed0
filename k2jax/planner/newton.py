"""Newton-Schulz over the mesh: who orthogonalises what, its operations, bytes sent and memory.

Matrices of one shape and stack layout go together. Cheap ones travel whole: to as many devices as
leaves each with fewest. Those above LARGE operations are iterated on by groups of devices.
"""

import dataclasses
import functools
import itertools
import math

from k2jax.config import MESH_AXES, MeshConfig, ModelConfig
from k2jax.params.kimi import declare_kimi
from k2jax.params.spec import ParamSpec
from k2jax.planner import network
from k2jax.planner.network import Wire
from k2jax.planner.shards import device_size, shard_axes
from k2jax.planner.step_flops import Case

STEPS = 5  # [ML 2.2]
LARGE = 1e12  # operations of a matrix above which several devices share it
SLICE = 2.0**27  # bytes of matrices that a device holds whole at a time


@dataclasses.dataclass(frozen=True)
class Group:
    """Matrices of one shape that go to their devices together.

    Attributes:
        leaves: parameters they come from, and with how much padding each travels (1: none).
        matrix: (shorter, longer) side.
        busiest: matrices that the busiest device works on.
        stacked: mesh axes that split the stack at rest, and stay.
        stack: mesh axes that will split the stack, too.
        longer: mesh axes that share a matrix.
        split: devices that share each matrix.
    """

    leaves: tuple[tuple[ParamSpec, float], ...]
    matrix: tuple[int, int]
    busiest: int
    stacked: tuple[str, ...]
    stack: tuple[str, ...]
    longer: tuple[str, ...]
    split: int


def width(case: Case) -> int:
    """Bytes of a number on its way and in the iteration."""
    return 4 if case.run.optim.ns_dtype == "float32" else 2


def flops(matrix: tuple[int, int]) -> float:
    """To orthogonalise one matrix: X X^T, its square, and the product with X, each step."""
    small, large = sorted(matrix)
    return STEPS * 2 * small**2 * (2 * large + small)


@functools.cache
def _shapes(cfg: ModelConfig) -> tuple[tuple[ParamSpec, ...], ...]:
    """Leaves whose matrices have one shape and whose stacks are split alike."""
    found: dict[tuple, list[ParamSpec]] = {}
    for leaf in declare_kimi(cfg).values():
        if leaf.group == "muon":
            found.setdefault((*sorted(leaf.matrix), "experts" in leaf.axes), []).append(leaf)
    return tuple(map(tuple, found.values()))


def groups(case: Case) -> tuple[Group, ...]:
    """How all matrices are shared out; leaves of more than a slice go one by one."""
    return _groups(case.model, case.mesh, width(case))


@functools.lru_cache(maxsize=4)  # asked for by a mesh's work, traffic and memory, one after another
def _groups(cfg: ModelConfig, mesh: MeshConfig, each: int) -> tuple[Group, ...]:
    found = []
    for alike in _shapes(cfg):
        held = each * sum(device_size(leaf, mesh) for leaf in alike)
        for part in [alike] if held <= SLICE else [(leaf,) for leaf in alike]:
            found.append(_group(part, mesh))
    return tuple(found)


def _group(part: tuple[ParamSpec, ...], mesh: MeshConfig) -> Group:
    over = lambda axes: math.prod([getattr(mesh, axis) for axis in axes])
    sizes = [axis for axis in MESH_AXES if getattr(mesh, axis) > 1]
    stacked = tuple(axis for axis in _over_dims(part[0], slice(part[0].stacked), mesh))
    at_rest = {axis for leaf in part for axis in shard_axes(leaf, mesh)}
    must = tuple(axis for axis in sizes if axis in at_rest and axis not in stacked)
    free = tuple(axis for axis in sizes if axis not in (*stacked, *must))
    counts = [math.prod(leaf.stack) // over(stacked) for leaf in part]
    matrix = (min(part[0].matrix), max(part[0].matrix))
    choose = _whole if flops(matrix) <= LARGE else _shared
    stack, longer = choose(sum(counts), matrix, must, free, over)
    busiest = math.ceil(sum(counts) / over(stack))
    slots = busiest * over(stack)
    # Together, each leaf has the slots of all, unless every one fills its devices evenly.
    even = all(count % over(stack) == 0 for count in counts)
    padding = tuple(1.0 if even else slots / count for count in counts)
    return Group(
        tuple(zip(part, padding, strict=True)), matrix, busiest, stacked, stack, longer,
        over(longer),
    )  # fmt: skip


def _over_dims(leaf: ParamSpec, dims: slice, mesh: MeshConfig) -> tuple[str, ...]:
    """Mesh axes that split these dims of a leaf."""
    return shard_axes(dataclasses.replace(leaf, axes=leaf.axes[dims]), mesh)


def _whole(count, matrix, must, free, over) -> tuple[tuple[str, ...], tuple[str, ...]]:
    del matrix
    choices = []
    for number in range(len(free) + 1):
        for more in itertools.combinations(free, number):
            axes = (*must, *more)
            choices.append((math.ceil(count / over(axes)), over(axes), axes))
    return _ordered(min(choices)[2]), ()


def _shared(count, matrix, must, free, over) -> tuple[tuple[str, ...], tuple[str, ...]]:
    axes, choices = must + free, []
    for number in range(len(axes) + 1):
        for longer in itertools.combinations(axes, number):
            stack = tuple(axis for axis in axes if axis not in longer)
            if not any(side % over(longer) for side in matrix):
                choices.append((math.ceil(count / over(stack)), -over(longer), stack, longer))
    _, _, stack, longer = min(choices)
    return _ordered(stack), _ordered(longer)


def _ordered(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in MESH_AXES if axis in axes)


def optimizer_flops(case: Case) -> float:
    """Operations of the busiest device."""
    if case.run.optim.name != "muonclip":
        return 0.0
    return sum(g.busiest * flops(g.matrix) / g.split for g in groups(case))


def undivided(cfg: ModelConfig, devices: int) -> float:
    """Operations of a device were all of them spread perfectly."""
    muon = (leaf for leaf in declare_kimi(cfg).values() if leaf.group == "muon")
    return sum(math.prod(leaf.stack) * flops(leaf.matrix) for leaf in muon) / devices


def optimizer_wire(case: Case) -> Wire:
    """Matrices to their devices and back, and the small products of those that are shared."""
    wire: Wire = {}
    if case.run.optim.name != "muonclip":
        return wire
    for group in groups(case):
        for leaf, padding in group.leaves:
            _leaf_wire(case, group, leaf, padding, wire)
        if group.longer:
            # Parts of X X^T are exchanged and summed; the sum and the polynomial are gathered.
            products = STEPS * group.busiest * width(case) * group.matrix[0] ** 2
            network.add(wire, "all-to-all", group.longer, case.mesh, products)
            network.add(wire, "all-gather", group.longer, case.mesh, 2 * products)
    return wire


def _leaf_wire(case: Case, group: Group, leaf: ParamSpec, padding: float, wire: Wire) -> None:
    """What splits a matrix at rest exchanges pieces; what does not picks, and gathers results."""
    mesh, add = case.mesh, network.add
    over = lambda axes: math.prod([getattr(mesh, axis) for axis in axes])
    mine = [axis for axis in shard_axes(leaf, mesh) if axis not in group.stacked]
    picked = [axis for axis in group.stack if axis not in mine]
    part = width(case) * device_size(leaf, mesh) * padding / over(picked)
    # Rows are the longer side; its axes stay where they will split it.
    rows, columns = leaf.matrix
    at = leaf.stacked + leaf.contracted
    shorter = _over_dims(
        leaf, slice(at, None) if rows >= columns else slice(leaf.stacked, at), mesh
    )
    turned = [axis for axis in group.longer if axis in shorter]
    pieces = [axis for axis in group.stack if axis in mine]
    add(wire, "all-to-all", pieces, mesh, 2 * part)
    add(wire, "all-to-all", turned, mesh, 2 * part)
    add(wire, "all-gather", [axis for axis in group.longer if axis not in mine], mesh, part)
    for axis in picked:
        part *= getattr(mesh, axis)
        add(wire, "all-gather", [axis], mesh, part)


def moment(case: Case, trained: float) -> dict[str, float]:
    """Bytes on top of the gradients at the worst moment, of which group it may be.

    All momenta in Nesterov's form wait in the dtype of the iteration; other groups are done, their
    updates float32 as the step's metrics read them.

    Args:
        case: run and mesh.
        trained: numbers on a device that are trained.
    """
    if case.run.optim.name != "muonclip":
        return {"updates": 4 * trained}
    moments, each = [], width(case)
    rest = lambda leaf: device_size(leaf, case.mesh)
    waiting = each * sum(
        rest(leaf) for leaf in declare_kimi(case.model).values() if leaf.group == "muon"
    )
    for group in groups(case):
        held = sum(rest(leaf) for leaf, _ in group.leaves)
        work = group.busiest * _one(group, each)
        if each * held > SLICE:  # whole, slice by slice in place
            work = each * held + max(_one(group, each), min(work, 4 * SLICE))
        updates = 4 * (trained - held)
        moments.append({"updates": updates, "momenta": waiting, "newton-schulz": work})
    return max(moments, key=lambda parts: sum(parts.values()))


def _one(group: Group, each: int) -> float:
    """Bytes of a matrix in the iteration: before and after a step, and its small products.

    A product is float32 until it is rounded.
    """
    small, large = group.matrix
    rounded = 4 if each < 4 else 0
    return (2 * each + rounded) * small * large / group.split + 8 * small**2
