"""A state as a flat dict of named arrays, and its comparison with a checkpoint."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax

from k2jax.config import ConfigError

Flat = dict[str, Any]
# name: [shape, dtype], as written with the arrays
Inventory = Mapping[str, tuple[list[int], str]]

# A chunk is the smallest thing that restore reads. 64 MiB holds one K2 expert matrix in float32.
CHUNK_BYTES = 64 * 2**20
SLICE_BYTES = 2**20


def flatten(tree: Any) -> Flat:
    """Return leaves by dotted path: a dict's keys, a NamedTuple's fields, a tuple's positions."""
    paths, _ = jax.tree.flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    assert len(flat) == len(paths), "two leaves of a state have one name"
    return flat


def unflatten(tree: Any, flat: Flat) -> Any:
    """Return `tree` with its leaves replaced by those of `flat`, by the names of `flatten`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[name] for name in flatten(tree)])


def inventory(flat: Flat) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of every leaf, for JSON."""
    return {name: (list(leaf.shape), str(leaf.dtype)) for name, leaf in flat.items()}


def compare(where: str, kind: str, saved: Inventory, wanted: Flat, exact: bool) -> None:
    """Refuse to restore arrays into a state of another form.

    Args:
        where: names the checkpoint.
        kind: "params" or "opt".
        saved: what the checkpoint holds.
        wanted: abstract arrays by name.
        exact: whether dtypes must agree too.

    Raises:
        ConfigError: names the first array that differs.
    """
    noun = "parameter" if kind == "params" else "optimizer state"
    reason = "another model" if kind == "params" else "another optimizer or model"
    for name, leaf in wanted.items():
        if name not in saved:
            raise ConfigError(f"{where} is of {reason}: it has no {noun} {name!r}")
        shape, dtype = saved[name]
        if tuple(shape) != tuple(leaf.shape):
            raise ConfigError(
                f"{where} is of {reason}: {noun} {name!r} is {_text(shape)} there and"
                f" {_text(leaf.shape)} here"
            )
        if exact and dtype != str(leaf.dtype):
            raise ConfigError(
                f"{where} is of another precision: {noun} {name!r} is {dtype} there and"
                f" {leaf.dtype} here"
            )
    if extra := [name for name in saved if name not in wanted]:
        raise ConfigError(f"{where} is of {reason}: its {noun} {extra[0]!r} is unknown here")


def _text(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"


def split_axes(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the leading axes whose slices are stored separately: layers, then experts.

    Orbax alone would cut the longest dims first, through every layer and expert. An axis is split
    while a chunk is larger than CHUNK_BYTES and the slices are not smaller than SLICE_BYTES.
    """
    inner = [*itertools.accumulate(reversed(shape), lambda a, b: a * b, initial=itemsize)][::-1]
    axes = []
    for axis in range(len(shape) - 2):
        if inner[axis] <= CHUNK_BYTES or inner[axis + 1] < SLICE_BYTES:
            break
        axes.append(axis)
    assert math.prod(shape) * itemsize == inner[0]
    return tuple(axes)


def place_concretely(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return the abstract array with a sharding on real devices; without one, on the first."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    elif isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
