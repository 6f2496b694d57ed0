"""What the optimizer, the converter and the planner need to know of one parameter."""

import dataclasses
import math

LAYER_AXES = ("dense_layers", "moe_layers", "mtp_layers")
STACK_AXES = (*LAYER_AXES, "experts")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter dict. Leaves of a kind are stacked over layers and experts.

    Attributes:
        axes: logical name of each dim; those in STACK_AXES come first.
        shape: length of each dim.
        contracted: dims after the stack that meet the input (the matrix's rows); 0: no matrix.
        group: what moves it: "muon", "adam", "bias" (moved by counts, never by gradients), or
            "frozen": nothing.
        published: tensor name in the published files; {l} is the layer, {e} the expert.
        dtype: in the published BF16 files.
        first_layer: layer number of the first slice of the stack.
        init: "normal", "ones" or "zeros".
        copies: other tensors of the published files that hold the same values.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    contracted: int
    group: str
    published: str = ""
    dtype: str = "bfloat16"
    first_layer: int = 0
    init: str = "normal"
    copies: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Numbers in all of it."""
        return math.prod(self.shape)

    @property
    def routed(self) -> bool:
        """Whether it belongs to the routed experts."""
        return "experts" in self.axes

    @property
    def stacked(self) -> int:
        """How many leading dims only stack matrices."""
        return sum(axis in STACK_AXES for axis in self.axes)

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stacked dims."""
        return self.shape[: self.stacked]

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of one matrix, as [in, out]."""
        inner = self.shape[self.stacked :]
        return math.prod(inner[: self.contracted]), math.prod(inner[self.contracted :])

    @property
    def published_shape(self) -> tuple[int, ...]:
        """Shape of one published tensor: [out, in] for a matrix."""
        return self.matrix[::-1] if self.contracted else self.shape[self.stacked :]
