"""Newton-Schulz over the mesh: operations, bytes sent and memory, as the optimizer routes it."""

import dataclasses
import functools

from k2jax.config import MeshConfig, ModelConfig
from k2jax.params.kimi import declare_kimi
from k2jax.params.matrices import Matrices, view_declared
from k2jax.params.route import (
    NS_STEPS,
    SLICE_BYTES,
    Leaf,
    Route,
    count_slots,
    group_leaves,
    is_even,
    newton_schulz_flops,
    route_group,
)
from k2jax.params.spec import ParamSpec
from k2jax.planner import network
from k2jax.planner.network import Wire
from k2jax.planner.partition import device_size
from k2jax.planner.step_flops import Case
from k2jax.sharding.table import split


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose matrices are orthogonalised together.

    Attributes:
        specs: their declarations.
        routes: how each one's matrices move.
        matrix: (longer, shorter) side.
        busiest: matrices that the busiest device works on.
        shared_by: devices that share each matrix.
    """

    specs: tuple[ParamSpec, ...]
    routes: tuple[Route, ...]
    matrix: tuple[int, int]
    busiest: int
    shared_by: int

    def padding(self, route: Route) -> float:
        """With how much padding a parameter is sent; 1: none."""
        return 1.0 if is_even(self.routes) else count_slots(self.routes) / route.matrices


def itemsize(case: Case) -> int:
    """Bytes of a number while it is sent and in the iteration."""
    return 4 if case.run.optim.ns_dtype == "float32" else 2


def groups(case: Case) -> tuple[Group, ...]:
    """Groups that the optimizer makes on the case's mesh; none for other optimizers."""
    if case.run.optim.name != "muonclip":
        return ()
    per_head = case.run.optim.matrix_view == "per_head"
    return _groups(case.model, case.mesh, itemsize(case), per_head)


@functools.cache
def _views(cfg: ModelConfig, per_head: bool) -> dict[str, Matrices]:
    views = {
        name: view_declared(name, spec, per_head)
        for name, spec in declare_kimi(cfg).items()
        if spec.group == "muon"
    }
    return {name: view for name, view in views.items() if isinstance(view, Matrices)}


@functools.lru_cache(maxsize=4)  # asked for by a mesh's work, traffic and memory, one after another
def _groups(cfg: ModelConfig, mesh: MeshConfig, each: int, per_head: bool) -> tuple[Group, ...]:
    specs, sizes = declare_kimi(cfg), mesh.sizes
    leaves = {
        name: Leaf(specs[name].shape, view, tuple(split(a, sizes) for a in specs[name].axes))
        for name, view in _views(cfg, per_head).items()
    }
    grouped = []
    for names in group_leaves(leaves, sizes, each):
        upright = [leaves[name].upright() for name in names]
        routes = route_group(upright, sizes)
        _, *matrix = upright[0].view.sizes(upright[0].shape)
        over, shared_by = routes[0].over(routes[0].stack), routes[0].over(routes[0].longer)
        grouped.append(
            Group(
                specs=tuple(specs[name] for name in names),
                routes=tuple(routes),
                matrix=(matrix[0], matrix[1]),
                busiest=count_slots(routes) // over,
                shared_by=shared_by,
            )
        )
    return tuple(grouped)


def optimizer_flops(case: Case) -> float:
    """Count operations of the busiest device."""
    work = (g.busiest * newton_schulz_flops(*g.matrix) / g.shared_by for g in groups(case))
    return sum(work, 0.0)


def optimizer_wire(case: Case) -> Wire:
    """Count bytes of matrices to their devices and back, and of shared ones' small products."""
    wire: Wire = {}
    for group in groups(case):
        for spec, route in zip(group.specs, group.routes, strict=True):
            _add_leaf(case, spec, route, group.padding(route), wire)
        longer = group.routes[0].longer
        if longer:
            # Parts of X X^T are exchanged and summed; the sum and the polynomial are gathered.
            products = NS_STEPS * group.busiest * itemsize(case) * group.matrix[1] ** 2
            network.add(wire, "all-to-all", longer, case.mesh, products)
            network.add(wire, "all-gather", longer, case.mesh, 2 * products)
    return wire


def _add_leaf(case: Case, spec: ParamSpec, route: Route, padding: float, wire: Wire) -> None:
    """Count one parameter: pieces are exchanged both ways; of what is picked, results gathered."""
    mesh, add = case.mesh, network.add
    part = itemsize(case) * device_size(spec, mesh) * padding / route.over(route.picked)
    add(wire, "all-to-all", route.pieces, mesh, 2 * part)
    add(wire, "all-to-all", route.turned, mesh, 2 * part)
    add(wire, "all-gather", route.sliced, mesh, part)
    for axis in route.picked:
        part *= getattr(mesh, axis)
        add(wire, "all-gather", [axis], mesh, part)


def moment(case: Case, trained: float) -> dict[str, float]:
    """Find the bytes on top of the gradients at the worst moment, of which group it may be.

    All momenta in Nesterov's form wait in the dtype of the iteration; other groups are done, their
    updates float32 as the step's metrics read them. The GPU compiler leaves updates in the dtype of
    the iteration, where momenta were, but for one parameter at a time.

    Args:
        case: run and mesh.
        trained: numbers on a device that are trained.
    """
    if case.run.optim.name != "muonclip":
        return {"updates": 4 * trained}
    moments, each = [], itemsize(case)
    sizes = [[device_size(spec, case.mesh) for spec in group.specs] for group in groups(case)]
    waiting = each * sum(map(sum, sizes))
    for i, group in enumerate(groups(case)):
        held, others = sum(sizes[i]), sizes[:i] + sizes[i + 1 :]
        work = group.busiest * _one_matrix(group, each)
        if each * held > SLICE_BYTES:  # whole, slice by slice in place
            work = each * held + max(_one_matrix(group, each), min(work, 4 * SLICE_BYTES))
        largest = max(map(max, others), default=0.0)
        updates = 4 * (largest if case.chip == "gpu" else trained - held)
        moments.append({"updates": updates, "momenta": waiting, "newton-schulz": work})
    return max(moments, key=lambda parts: sum(parts.values()))


def _one_matrix(group: Group, each: int) -> float:
    """Bytes of a matrix in the iteration: before and after a step, and its small products.

    A product is float32 until it is rounded.
    """
    large, small = group.matrix
    rounded = 4 if each < 4 else 0
    return (2 * each + rounded) * small * large / group.shared_by + 8 * small**2
