"""Converted checkpoints: published tensors as chunks of our stacked arrays.

A leaf is a Zarr array that Orbax restores. A chunk is one file with one matrix of the stack (or one
head of it, or some of its rows, at most 64 MiB), plain bytes in the order of the published tensor
("F": our [in, out] is its [out, in]). So writing moves no byte twice, every chunk appears by one
rename, and restoring reads just the (layer, expert) matrices that a device needs. Quantised leaves
are kept as published, under names of their own, so that nobody takes codes for weights:
`x.fp8` (uint8 codes) with `x.scale`, `x.packed` with `x.scale`.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from k2jax.checkpoint.tree import CHUNK_BYTES
from k2jax.config import ConfigError, one_line
from k2jax.params.spec import ParamSpec
from k2jax.runtime.files import write_atomic
from k2jax.sharding import storage_spec
from k2jax.weights import quant
from k2jax.weights.encodings import SCALE, ReencodedTensors
from k2jax.weights.mapping import StackIndex, published_name, stack_slots, to_our_dims

# The tensors of a weight, and the leaves they fill.
PLAIN = {"": ""}
FP8_LEAVES = {"": ".fp8", SCALE: ".scale"}
INT4_LEAVES = {"_packed": ".packed", "_scale": ".scale"}
LEAVES = {"plain": PLAIN, "fp8": FP8_LEAVES, "int4": INT4_LEAVES}
# A tensor up to this size is read in one piece, larger ones by rows of chunks.
WHOLE = 4 * CHUNK_BYTES


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a converted checkpoint.

    Attributes:
        name: of the folder.
        part: what is added to a weight's name to get its tensor's.
        dtype: of the values; float8 codes are stored as uint8.
        spec: shape and dims; for quantised leaves those of the published matrix, transposed.
        chunk: shape of one file.
    """

    name: str
    part: str
    dtype: np.dtype
    spec: ParamSpec
    chunk: tuple[int, ...]

    @property
    def order(self) -> str:
        """Order of a chunk's bytes."""
        return "F" if self.spec.contracted else "C"

    @property
    def stored(self) -> np.dtype:
        """Dtype in the files."""
        return np.dtype(np.uint8) if self.dtype == quant.FP8 else self.dtype

    def zarray(self) -> str:
        """The `.zarray` file."""
        kind = "bfloat16" if self.dtype == quant.BF16 else self.stored.str
        fields = {
            "chunks": self.chunk,
            "compressor": None,
            "dimension_separator": ".",
            "dtype": kind,
            "fill_value": None,
            "filters": None,
            "order": self.order,
            "shape": self.spec.shape,
            "zarr_format": 2,
        }
        return json.dumps(fields, separators=(",", ":"))

    @property
    def chunk_bytes(self) -> int:
        """Size of every file: chunks divide their array."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def grid(self) -> list[range]:
        """How many chunks there are along each dim."""
        return [range(n // c) for n, c in zip(self.spec.shape, self.chunk, strict=True)]


def layout(
    specs: Mapping[str, ParamSpec],
    view: ReencodedTensors,
    mesh: jax.sharding.AbstractMesh | None = None,
) -> list[Leaf]:
    """The arrays that hold the tensors of `view`.

    Args:
        specs: the model's parameters.
        view: what will be written.
        mesh: devices on it should find their parts in chunks of their own.

    Raises:
        ConfigError: a leaf's weights are quantised in part.
    """
    leaves = []
    for name, spec in specs.items():
        weights = [weight for _, weight in stack_slots(spec)]
        how = view.encoded[weights[0]]
        if other := [w for w in weights if view.encoded[w] != how]:
            raise ConfigError(
                f"{view.file(other[0])}: {other[0]!r} is {view.encoded[other[0]]}, {weights[0]!r}"
                f" is {how}; give a format other than keep"
            )
        for part, suffix in LEAVES[how].items():
            dtype, shape = _uniform(view, [weight + part for weight in weights])
            leaf = spec
            if how != "plain":
                leaf = dataclasses.replace(
                    spec,
                    axes=(*spec.axes[: spec.stacked], "", ""),
                    contracted=1,
                    shape=(*spec.stack, *shape[::-1]),
                )
            chunk = _chunk(leaf, dtype.itemsize, mesh if how == "plain" else None)
            leaves.append(Leaf(name + suffix, part, dtype, leaf, chunk))
    return leaves


def _uniform(view: ReencodedTensors, names: list[str]) -> tuple[np.dtype, tuple[int, ...]]:
    kind = view.kind(names[0])
    for name in names:
        if view.kind(name) != kind:
            raise ConfigError(
                f"{view.file(name)}: {name!r} is {view.dtype(name)}, {names[0]!r} is {kind[0]};"
                " give a format other than keep"
            )
    return kind


def _chunk(
    spec: ParamSpec, itemsize: int, mesh: jax.sharding.AbstractMesh | None
) -> tuple[int, ...]:
    chunk = [1] * spec.stacked + list(spec.shape[spec.stacked :])
    if len(chunk) - spec.stacked > 2:
        # With one head, reversing all dims gives the published order.
        chunk[spec.axes.index("heads")] = 1
    if mesh is not None:
        part = jax.NamedSharding(mesh, storage_spec(spec.axes)).shard_shape(spec.shape)
        chunk = [math.gcd(c, p) for c, p in zip(chunk, part, strict=True)]
    rows = spec.stacked + (spec.contracted if len(chunk) > spec.stacked + 1 else 0)
    while math.prod(chunk) * itemsize > CHUNK_BYTES and chunk[rows] > 1:
        n = chunk[rows]
        chunk[rows] = next(k for k in range(n - 1, 0, -1) if n % k == 0)
    return tuple(chunk)


def write_tensor(folder: Path, leaf: Leaf, where: StackIndex, view: ReencodedTensors) -> int:
    """Write the chunks of one published tensor that are not there yet; the bytes written."""
    name = published_name(leaf.spec, where) + leaf.part
    grid = [[at] for at in where] + [list(cells) for cells in leaf.grid()[len(where) :]]
    done = 0
    for rows, cells in _bands(leaf, grid, view.shape(name)):
        missing = [at for at in cells if not _is_there(folder / key(at), leaf.chunk_bytes)]
        if not missing:
            continue
        band = ours_rows(leaf, view.read(name, rows))
        first = cells[0]
        for at in missing:
            cut = tuple(
                slice((a - f) * c, (a - f + 1) * c)
                for a, f, c in zip(at, first, leaf.chunk, strict=True)
            )[len(where) :]
            block = band[cut]
            data = np.ascontiguousarray(block.T if leaf.order == "F" else block)
            write_atomic(folder / key(at), data.reshape(-1).view(np.uint8).data)
            done += data.nbytes
    return done


def _bands(
    leaf: Leaf, grid: list[list[int]], shape: tuple[int, ...]
) -> Iterator[tuple[slice, list[tuple[int, ...]]]]:
    """Rows of a published tensor to read at a time, and the chunks they fill."""
    if math.prod(shape) * leaf.dtype.itemsize <= WHOLE:
        yield slice(None), list(itertools.product(*grid))
        return
    dim = leaf.spec.stacked + leaf.spec.contracted
    rows = leaf.chunk[dim] * shape[0] // leaf.spec.shape[dim]
    for n, cell in enumerate(grid[dim]):
        cells = [*grid[:dim], [cell], *grid[dim + 1 :]]
        yield slice(n * rows, (n + 1) * rows), list(itertools.product(*cells))


def ours_rows(leaf: Leaf, tensor: np.ndarray) -> np.ndarray:
    """Some rows of a published tensor, with our dims."""
    whole = math.prod(leaf.spec.shape[leaf.spec.stacked :])
    if tensor.size == whole or not leaf.spec.contracted:
        return to_our_dims(leaf.spec, tensor)
    dim = leaf.spec.stacked + leaf.spec.contracted
    shape = list(leaf.spec.shape)
    shape[dim] = shape[dim] * tensor.size // whole
    return to_our_dims(dataclasses.replace(leaf.spec, shape=tuple(shape)), tensor)


def key(at: Iterable[int]) -> str:
    """File name of a chunk."""
    return ".".join(map(str, at))


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def tree_metadata(leaves: Iterable[Leaf]) -> str:
    """Orbax's `_METADATA` file."""
    tree = {
        f"('{leaf.name}',)": {
            "key_metadata": [{"key": leaf.name, "key_type": 2}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": leaf.spec.shape,
            },
        }
        for leaf in leaves
    }
    flags = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return json.dumps({"tree_metadata": tree, **flags, "custom_metadata": None})


def check_files(params: Path, names: Iterable[str]) -> None:
    """Refuse a converted checkpoint that lacks a chunk or has one of another size.

    TensorStore would read a missing chunk as zeros.

    Args:
        params: the folder of the leaves.
        names: of the leaves.

    Raises:
        ConfigError: names the first such file.
    """
    for name in names:
        folder = params / name
        try:
            fields = json.loads((folder / ".zarray").read_text())
            shape, chunk, dtype = fields["shape"], fields["chunks"], fields["dtype"]
            kind = quant.BF16 if dtype == "bfloat16" else np.dtype(dtype)
            size = math.prod(chunk) * kind.itemsize
            grid = [range(n // c) for n, c in zip(shape, chunk, strict=True)]
            found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{folder} is damaged: {one_line(error, typed=True)}") from None
        for at in itertools.product(*grid):
            if (there := found.get(key(at))) != size:
                state = "is missing" if there is None else f"has {there} bytes"
                raise ConfigError(
                    f"{folder / key(at)} {state}; a chunk of {size} bytes was written there"
                )
