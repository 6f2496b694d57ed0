"""What a compiled program does in one run: operations and bytes sent, loops counted in full.

XLA's own cost analysis counts the body of a loop once. Here the text of the optimised program is
read: every computation is weighed by how often it runs, which a loop's trip count says.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from k2jax.config import MESH_AXES
from k2jax.planner.network import Wire

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
CALLS = ("call", "async-start", "call-start")  # the last: on a TPU's sparse core
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_TOLD = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
# The kernel of a call; no estimate is kept. Triton's and Mosaic's calls.
_KERNEL = re.compile(r'\bname = "(\w+)", num_stages|"mosaic_gpu_v2".*op_name="[^"]*/(\w+)/\w+"')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: list[tuple[str, tuple[int, ...]]]
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the arguments."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def attribute(self, name: str) -> str:
        """Text of `name=...` up to the next comma outside of braces."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return match[1] if match else ""


@dataclasses.dataclass
class Account:
    """Sums over one run of a program, for one device."""

    flops: float = 0.0
    wire: Wire = dataclasses.field(default_factory=dict)
    largest: float = 0.0  # bytes of the largest array that a collective takes, or gathers
    # Kernels that tell nothing of their work, and loops whose count only the data knows.
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    open_loops: int = 0


def account(text: str, mesh: tuple[int, ...] = (), open_trips: float = 1.0) -> Account:
    """Read an optimised program.

    Args:
        text: `compiled.as_text()`.
        mesh: sizes of MESH_AXES, to name the axes of a collective.
        open_trips: how often a loop runs whose count only the data knows.

    Returns:
        Matrix products at two operations a multiplication, those of a TPU kernel as it tells them,
        of our GPU kernels by their operands; ring bytes of collectives, an all-to-all as (n-1)/n of
        its operand, a ragged one of the smaller of its two buffers: the other has room for more
        than is sent on average.
    """
    entry, computations = _parse(text)
    counted = Account()
    times = _times(entry, computations, counted, open_trips)
    for name, weight in times.items():
        lines = computations[name]
        shapes = {line.name: line.shapes for line in lines}
        scattered = name.startswith("all-reduce-scatter")  # TPU: one fused reduce-scatter
        for line in lines:
            counted.flops += weight * _flops(line, shapes)
            if line.op == "custom-call" and not _flops(line, shapes):
                counted.kernels[line.attribute("custom_call_target").strip('"')] += int(weight)
            _collective(line, shapes, weight, mesh, scattered, counted)
    return counted


def _parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    entry = ""
    lines: list[Instruction] = []
    computations: dict[str, list[Instruction]] = {}
    for row in text.splitlines():
        head = _HEAD.match(row)
        if head and not row.startswith("HloModule"):
            lines = computations.setdefault(head[1], [])
            entry = head[1] if row.startswith("ENTRY") else entry
            continue
        match = _LINE.match(row)
        if match:
            shapes = [
                (kind, tuple(map(int, dims.split(","))) if dims else ())
                for kind, dims in _SHAPE.findall(match[2])
            ]
            lines.append(Instruction(match[1], shapes, match[3], match[4]))
    return entry, computations


def _times(
    entry: str, computations: dict[str, list[Instruction]], counted: Account, open_trips: float
) -> dict[str, float]:
    """How often each computation runs. Callees stand before their callers in the text."""
    times: dict[str, float] = defaultdict(float)
    times[entry] = 1.0
    for name in reversed(list(computations)):
        weight = times.get(name, 0.0)
        if not weight:
            continue
        for line in computations[name]:
            count = 1.0
            if line.op == "while":
                trips = _trips(line, computations)
                counted.open_loops += trips is None
                count = float(trips or open_trips)
            for callee in _callees(line):
                times[callee] += weight * count
    return dict(times)


def _callees(line: Instruction) -> Iterator[str]:
    keys = {"while": ("body",), "conditional": ("true_computation", "false_computation")}
    names = keys.get(line.op, ("calls", "to_apply") if line.op in CALLS else ())
    if line.op == "fusion":
        names = ("calls",)
    for name in names:
        callee = line.attribute(name).lstrip("%")
        if callee:
            yield callee
    if line.op == "conditional":
        yield from re.findall(r"%([\w.\-]+)", line.attribute("branch_computations"))


def _trips(line: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """Known trip count of a loop; else the constant that its condition compares with."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line.rest)
    if known:
        return int(known[1])
    condition = computations.get(line.attribute("condition").lstrip("%"), [])
    constants = {
        c.name: int(c.rest.split(")")[0])
        for c in condition
        if c.op == "constant" and re.match(r"-?\d+\)", c.rest) and c.shapes[0][0] != "pred"
    }
    return next(iter(constants.values())) if len(constants) == 1 else None


def _size(shape: tuple[str, tuple[int, ...]]) -> float:
    return BYTES.get(shape[0], 0) * math.prod(shape[1])


def _flops(line: Instruction, shapes: dict) -> float:
    if line.op == "convolution":
        return _convolution(line, shapes)
    if stated := line.op == "custom-call" and _TOLD.search(line.rest):
        return float(stated[1])
    if kernel := line.op == "custom-call" and _KERNEL.search(line.rest):
        operands = [shapes[name][0][1] for name in line.operands]
        return _kernel(kernel[1] or kernel[2], operands, line.shapes[0][1])
    ragged = line.op == "ragged-dot"
    gemm = line.op == "custom-call" and "gemm" in line.attribute("custom_call_target")
    if not (line.op == "dot" or ragged or gemm):
        return 0.0
    out, left = line.shapes[0], shapes[line.operands[0]][0]
    if gemm:
        numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line.rest)
        text = numbers[1].replace('"', "") if numbers else ""
    else:
        text = line.attribute("lhs_contracting_dims").strip("{}")
    contracted = math.prod(left[1][int(dim)] for dim in text.split(",") if dim.strip())
    return 2.0 * math.prod(out[1]) * contracted


# Of attention's kernels on GPUs: products as wide as a query, and as wide as a value.
ATTENTION = {"_attention": (1, 1), "_attention_dq": (2, 1), "_attention_dkv": (2, 2)}
GROUPED = ("_tile", "_sum")


def _kernel(name: str, operands: list[tuple[int, ...]], out: tuple[int, ...]) -> float:
    """Operations of our own GPU kernels (`k2jax/ops`); 0 for others.

    Every row of a buffer counts, and half of all pairs of queries and keys, as on TPUs.
    """
    if name in GROUPED:
        return 2.0 * math.prod(operands[-2]) * out[-1]
    if name not in ATTENTION:
        return 0.0
    batch, heads, length, query = operands[2]
    value = operands[5 if name == "_attention" else 3][3]
    queries, values = ATTENTION[name]
    return batch * heads * length**2 * float(queries * query + values * value)


def _convolution(line: Instruction, shapes: dict) -> float:
    """TPUs write products as convolutions; a batch dim becomes a dilated spatial one."""
    labels = line.attribute("dim_labels")
    inputs, kernel, output = re.split(r"_|->", labels)
    left, right = (shapes[name][0][1] for name in line.operands[:2])
    out = line.shapes[0][1]
    total = 2.0 * right[kernel.index("i")]
    total *= math.prod(out[output.index(label)] for label in "bf")
    window = _window(line)
    for dim, label in enumerate(c for c in sorted(kernel) if c.isdigit()):
        total *= _taps(
            left[inputs.index(label)],
            right[kernel.index(label)],
            out[output.index(label)],
            {key: values[dim] for key, values in window.items()},
        )
    return total


def _window(line: Instruction) -> dict[str, list[str]]:
    text = line.attribute("window").strip("{}")
    return {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", text)}


def _taps(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of output position and kernel position that meet a real element."""
    stride, left_dilation, right_dilation = (
        int(window.get(key) or 1) for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * right_dilation - low
    real = (at >= 0) & (at % left_dilation == 0) & (at // left_dilation < size)
    return int(real.sum())


def _collective(
    line: Instruction,
    shapes: dict,
    weight: float,
    mesh: tuple[int, ...],
    scattered: bool,
    counted: Account,
) -> None:
    kind = line.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    members = _members(line)
    ways = len(members)
    axes = _axes(members, mesh)
    size = sum(_size(shape) for name in line.operands for shape in shapes.get(name, [])[:1])
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    if kind == "all-gather":
        size *= ways
    if kind == "ragged-all-to-all":
        # What is sent, and what it is written into: a start's own shape is a tuple of both.
        size = min(_size(shapes[name][0]) for name in line.operands[:2])
    counted.largest = max(counted.largest, size if ways > 1 else 0.0)
    share = 1.0 if kind == "collective-permute" else (ways - 1) / ways
    sent = size * share * (2 if kind == "all-reduce" else 1)
    if sent:
        row = counted.wire.setdefault(kind, {})
        row[axes] = row.get(axes, 0.0) + weight * sent


def _members(line: Instruction) -> list[int]:
    """Devices of the first group of a collective."""
    if "source_target_pairs" in line.rest:
        match = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line.rest)
        return [int(match[1]), int(match[2])] if match else [0]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line.rest)
    if iota:
        ids = np.arange(math.prod(_numbers(iota[3]))).reshape(_numbers(iota[3]))
        ids = ids.transpose(_numbers(iota[4])) if iota[4] else ids
        return ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    named = re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", line.rest)
    if named:
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = np.arange(math.prod(sizes.values()))
        if named[2]:
            ids = ids.reshape(_numbers(named[2])).transpose(_numbers(named[3]))
        along = re.findall(r"'(\w+)'", named[4])
        first = tuple(slice(None) if axis in along else 0 for axis in sizes)
        return ids.reshape(tuple(sizes.values()))[first].ravel().tolist()
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", line.rest)
    return [int(n) for n in match[1].split(",")] if match else [0]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(members: list[int], mesh: tuple[int, ...]) -> str:
    """Mesh axes along which the members of a group differ."""
    if not mesh or max(members) >= math.prod(mesh):
        return "unknown"
    coordinates = np.array(np.unravel_index(members, mesh))
    differ = (coordinates != coordinates[:, :1]).any(axis=1)
    return "+".join(axis for axis, here in zip(MESH_AXES, differ, strict=True) if here)
