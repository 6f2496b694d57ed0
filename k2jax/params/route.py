"""Which devices orthogonalise which matrices. Read without jax: the planner asks here too.

Leaves of one matrix shape, whose stacks are split alike, go together (`group_leaves`); each then
has a `Route` (`route_group`). `distribute` moves the matrices along it.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from k2jax.params.matrices import Matrices

NS_STEPS = 5  # of the Newton-Schulz iteration [ML 2.2]
# A matrix of more operations is iterated on by several devices: its collectives then take less
# time than they save (2 ms of a v5p chip).
SHARD_ABOVE_FLOPS = 1e12
SLICE_BYTES = 2**27  # of matrices that a device holds whole at a time
Axes = tuple[str, ...]
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter as routing needs it.

    Attributes:
        shape: of the whole array.
        view: its matrices.
        layout: mesh axes that split each dim at rest.
    """

    shape: tuple[int, ...]
    view: Matrices
    layout: tuple[Axes, ...]

    def split(self, dims: Iterable[int]) -> Axes:
        """Mesh axes that split these dims at rest."""
        return tuple(axis for dim in dims for axis in self.layout[dim])

    def upright(self) -> "Leaf":
        """With the longer side as rows: a transposed matrix has the transposed result."""
        _, rows, columns = self.view.sizes(self.shape)
        turned = Matrices(self.view.columns, self.view.rows, self.view.stack)
        return self if rows >= columns else dataclasses.replace(self, view=turned)


@dataclasses.dataclass(frozen=True)
class Route:
    """How one leaf [matrices, longer, shorter] moves; mesh axes are in the mesh's order.

    Attributes:
        rows: split the rows at rest.
        columns: split the columns at rest.
        stack: will split the stack, besides those that do so at rest.
        longer: will split the rows, the longer side.
        sizes: devices along each axis.
        matrices: of this device's part of the stack at rest.
    """

    rows: Axes
    columns: Axes
    stack: Axes
    longer: Axes
    sizes: tuple[tuple[str, int], ...]
    matrices: int

    def over(self, axes: Axes) -> int:
        """Devices along `axes` together."""
        return math.prod([size for axis, size in self.sizes if axis in axes])

    @property
    def pieces(self) -> Axes:
        """Axes that exchange pieces of matrices for whole ones."""
        return tuple(axis for axis in self.stack if axis in self.rows + self.columns)

    @property
    def picked(self) -> Axes:
        """Axes that split nothing at rest: each device picks its matrices of the stack."""
        return tuple(axis for axis in self.stack if axis not in self.rows + self.columns)

    @property
    def turned(self) -> Axes:
        """Axes that split columns at rest and will split rows."""
        return tuple(axis for axis in self.longer if axis in self.columns)

    @property
    def sliced(self) -> Axes:
        """Axes that split nothing at rest and will split rows."""
        return tuple(axis for axis in self.longer if axis not in self.rows + self.columns)


def newton_schulz_flops(rows: int, columns: int, steps: int = NS_STEPS) -> int:
    """Count operations of the standard iteration on one matrix [TT dist_muon.py 1036]."""
    short, long = sorted((rows, columns))
    return steps * 2 * short**2 * (2 * long + short)


def count_devices(axes: Iterable[str], sizes: Sizes) -> int:
    """Count devices along `axes` together; an axis that the mesh lacks has one."""
    return math.prod([sizes.get(axis, 1) for axis in axes])


def group_leaves(
    leaves: Mapping[str, Leaf], sizes: Sizes, itemsize: int, slice_bytes: int = SLICE_BYTES
) -> list[list[str]]:
    """Choose which leaves go together: of one matrix shape, their stacks split alike.

    Leaves that together hold more than `slice_bytes` a device go by themselves, slice by slice.

    Args:
        leaves: by name.
        sizes: devices along each mesh axis.
        itemsize: bytes of a number.
        slice_bytes: of matrices that a device holds whole at a time.
    """
    groups: dict[tuple, list[str]] = {}
    held: dict[tuple, float] = {}
    for name, leaf in leaves.items():
        _, rows, columns = leaf.view.sizes(leaf.shape)
        key = (*sorted((rows, columns)), leaf.split(leaf.view.stack))
        groups.setdefault(key, []).append(name)
        ways = count_devices(leaf.split(range(len(leaf.shape))), sizes)
        held[key] = held.get(key, 0) + math.prod(leaf.shape) * itemsize / ways
    return [
        part
        for key, group in groups.items()
        for part in ([group] if held[key] <= slice_bytes else [[name] for name in group])
    ]


def route_group(
    leaves: Sequence[Leaf], sizes: Sizes, shard_above: float = SHARD_ABOVE_FLOPS
) -> list[Route]:
    """Choose how leaves of one matrix shape get orthogonalised together.

    Leaves whose stack is not split at rest share the same devices, each in slots of its own.

    Args:
        leaves: upright.
        sizes: devices along each mesh axis, in the mesh's order.
        shard_above: operations of a matrix above which several devices share it.
    """
    sizes = {axis: size for axis, size in sizes.items() if size > 1}
    stacked = _ordered(leaves[0].split(leaves[0].view.stack), sizes)
    rows = [_ordered(leaf.split(leaf.view.rows), sizes) for leaf in leaves]
    columns = [_ordered(leaf.split(leaf.view.columns), sizes) for leaf in leaves]
    over = count_devices(stacked, sizes)
    counts = [leaf.view.sizes(leaf.shape)[0] // over for leaf in leaves]
    _, height, width = leaves[0].view.sizes(leaves[0].shape)
    used = {axis for axes in (*rows, *columns) for axis in axes}
    required_axes = tuple(axis for axis in sizes if axis in used)
    free_axes = tuple(axis for axis in sizes if axis not in stacked + required_axes)
    longer: Axes = ()
    if newton_schulz_flops(height, width) <= shard_above:
        stack = _route_whole(sum(counts), required_axes, free_axes, sizes)
    else:
        axes = required_axes + free_axes
        stack, longer = _route_shared(sum(counts), (height, width), axes, sizes)
    return [
        Route(rows[k], columns[k], stack, longer, tuple(sizes.items()), counts[k])
        for k in range(len(leaves))
    ]


def count_slots(routes: Sequence[Route]) -> int:
    """Count the matrices of a group, and the padding that makes them divide over their devices."""
    over = routes[0].over(routes[0].stack)
    return -(-sum(route.matrices for route in routes) // over) * over


def is_even(routes: Sequence[Route]) -> bool:
    """Whether each leaf of a group fills its devices without padding."""
    over = routes[0].over(routes[0].stack)
    return all(route.matrices % over == 0 for route in routes)


def _route_whole(count: int, required_axes: Axes, free_axes: Axes, sizes: Sizes) -> Axes:
    """Every axis that splits a matrix, and the fewest others that leave a device fewest matrices.

    Results are gathered over free axes, padding too: not more of them than there are matrices for.
    """
    choices = []
    for number in range(len(free_axes) + 1):
        for more in itertools.combinations(free_axes, number):
            ways = count_devices(required_axes + more, sizes)
            choices.append((-(-count // ways), ways, required_axes + more))
    return _ordered(min(choices)[2], sizes)


def _route_shared(
    count: int, matrix: tuple[int, int], axes: Axes, sizes: Sizes
) -> tuple[Axes, Axes]:
    """Fewest matrices a group of devices, because collectives cost by the matrix; large groups."""
    choices = []
    for number in range(len(axes) + 1):
        for longer in itertools.combinations(axes, number):
            stack = tuple(axis for axis in axes if axis not in longer)
            group = count_devices(longer, sizes)
            if not any(side % group for side in matrix):
                each = -(-count // count_devices(stack, sizes))
                choices.append((each, -group, stack, longer))
    _, _, stack, longer = min(choices)
    return _ordered(stack, sizes), _ordered(longer, sizes)


def _ordered(axes: Axes, sizes: Sizes) -> Axes:
    """`axes` in the mesh's order, without those that split nothing."""
    return tuple(axis for axis in sizes if axis in axes)
