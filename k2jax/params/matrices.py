"""A parameter as a stack of matrices. Read without jax."""

import dataclasses
import math

from k2jax.config import ConfigError
from k2jax.params.spec import ParamSpec

# Last two axes of projections to queries, and to keys (with values after them, or alone).
QUERIES = (("heads", "qk"),)
KEYS = (("heads", "kv"), ("heads", "k"))


@dataclasses.dataclass(frozen=True)
class Matrices:
    """A leaf as a stack of matrices. Each dim of the leaf is in exactly one of the three.

    Attributes:
        rows: dims that meet the input.
        columns: dims of the output.
        stack: dims that only stack matrices: layers, experts, heads.
    """

    rows: tuple[int, ...] = (0,)
    columns: tuple[int, ...] = (1,)
    stack: tuple[int, ...] = ()

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Matrices, rows and columns of a leaf of `shape`."""
        count, rows, columns = (
            math.prod(shape[dim] for dim in dims) for dims in (self.stack, self.rows, self.columns)
        )
        return count, rows, columns


def view_declared(name: str, spec: ParamSpec, per_head: bool = False) -> Matrices | str:
    """Find the matrices of a declared parameter, or "adam".

    Args:
        name: of the parameter, for the error.
        spec: its declaration.
        per_head: see queries, and keys with values, as one matrix a head.

    Raises:
        ConfigError: it is neither a matrix nor Adam's.
    """
    if spec.group == "adam":
        return "adam"
    if spec.group != "muon" or not spec.contracted:
        raise ConfigError(
            f"{name!r} is of group {spec.group!r} and no matrix; leave it out, or move it by Adam"
        )
    cut = spec.stacked + spec.contracted
    stack, rows, columns = (
        tuple(range(first, last))
        for first, last in ((0, spec.stacked), (spec.stacked, cut), (cut, len(spec.axes)))
    )
    if per_head and spec.axes[-2:] in QUERIES + KEYS:
        heads = len(spec.axes) - 2
        return Matrices(rows, tuple(dim for dim in columns if dim != heads), (*stack, heads))
    return Matrices(rows, columns, stack)
