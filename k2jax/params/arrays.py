"""Arrays of declared parameters: draw them, describe them, bind them under their attributes."""

import functools
import itertools
import types
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k2jax.params import low_bit_parts
from k2jax.params.spec import ParamSpec
from k2jax.runtime.hardware import count_cores
from k2jax.sharding import meshless, storage_spec

# A plain parameter is an array, a low-bit one a pytree of `k2jax.ops.lowbit`.
Params = dict[str, Any]
Module = TypeVar("Module")
Place = tuple[range, ...]  # of a part in its array, along each dim


class RouterBias(nnx.Variable):
    """Steers the choice of experts: moved by counts, never by gradients [DSV3-TR 2.1.2]."""


def bind(declared: Module, params: Mapping[str, jax.Array]) -> Module:
    """Copy declarations as nnx modules of the same classes, with arrays in the place of specs.

    Args:
        declared: says which parameters there are.
        params: arrays by name; more than it declares do not matter.

    Raises:
        KeyError: a parameter is missing.
    """

    def copy(part: Any, name: str) -> Any:
        if isinstance(part, ParamSpec):
            return _variable(part, params[name])
        bound = _module_class(type(part))()  # type: ignore[arg-type]  # classes are hashable
        for key, inner in vars(part).items():
            setattr(bound, key, copy(inner, f"{name}.{key}" if name else key))
        return bound

    return copy(declared, "")


def _variable(leaf: ParamSpec, array: jax.Array) -> nnx.Variable:
    kind = RouterBias if leaf.group == "bias" else nnx.Param
    # `out_sharding` is Flax's own annotation; the arrays are placed by `initial`.
    return kind(array, out_sharding=leaf.axes, eager_sharding=False, spec=leaf)


@functools.cache
def _module_class(declared: type) -> type:
    """Derive from a class of declarations an nnx module that starts without attributes."""
    body = {"__init__": object.__init__, "__module__": declared.__module__}
    return types.new_class(
        declared.__name__, (declared, nnx.Module), exec_body=lambda space: space.update(body)
    )


def initial(specs: Mapping[str, ParamSpec], seed: int, std: float) -> Params:
    """Draw float32 parameters, each device only its part, without compiling anything.

    Every matrix is drawn by NumPy from (seed, name, layer, expert), so the weights are the same
    on any mesh and any number of hosts. A host holds its own parts of one parameter at a time, and
    a matrix for each core.

    Args:
        specs: what to draw.
        seed: of the run.
        std: standard deviation of the normal ones; gains are 1, the router bias 0.
    """
    return {name: _draw(name, leaf, seed, std) for name, leaf in specs.items()}


def _draw(name: str, leaf: ParamSpec, seed: int, std: float) -> jax.Array:
    if meshless():
        whole = tuple(range(n) for n in leaf.shape)
        return jnp.asarray(_draw_parts(name, leaf, seed, std, [whole])[whole])
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), storage_spec(leaf.axes))
    cuts = sharding.addressable_devices_indices_map(leaf.shape)
    places = {
        device: tuple(range(n)[cut] for n, cut in zip(leaf.shape, index or (), strict=True))
        for device, index in cuts.items()
    }
    parts = _draw_parts(name, leaf, seed, std, list(dict.fromkeys(places.values())))
    arrays = [jax.device_put(parts[place], device) for device, place in places.items()]
    # Wait: what is on its way to a device would be in memory beside the next parameter's parts.
    jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _draw_parts(
    name: str, leaf: ParamSpec, seed: int, std: float, places: list[Place]
) -> dict[Place, np.ndarray]:
    """Draw the parts of a leaf that this host stores.

    Every matrix is drawn once, by one of as many threads as there are cores, and forgotten when
    each part that meets it has its share.
    """
    value = float(leaf.init == "ones")
    parts = {place: np.full([len(r) for r in place], value, np.float32) for place in places}
    if leaf.init != "normal":
        return parts
    inner = leaf.shape[leaf.stacked :]

    def draw(at: tuple[int, ...]) -> None:
        matrix = draw_matrix(seed, name, at, inner, std)
        for place, part in parts.items():
            stack, rest = place[: leaf.stacked], place[leaf.stacked :]
            if all(i in r for i, r in zip(at, stack, strict=True)):
                own = tuple(i - r.start for i, r in zip(at, stack, strict=True))
                part[own] = matrix[tuple(slice(r.start, r.stop) for r in rest)]

    wanted = dict.fromkeys(at for p in places for at in itertools.product(*p[: leaf.stacked]))
    with ThreadPoolExecutor(count_cores()) as pool:
        for _ in pool.map(draw, wanted):
            pass
    return parts


def draw_matrix(
    seed: int, name: str, at: tuple[int, ...], shape: tuple[int, ...], std: float
) -> np.ndarray:
    """Draw the matrix at a place in the stack of a parameter."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), *at])
    matrix = rng.standard_normal(shape, np.float32)
    matrix *= np.float32(std)
    return matrix


def abstract(
    specs: Mapping[str, ParamSpec], dtype: str = "float32", weights: str = "plain"
) -> dict[str, Any]:
    """Shape, dtype and layout of every parameter on the mesh in use, real or pretended.

    Args:
        specs: the parameters.
        dtype: of plain ones.
        weights: "plain", or "fp8" or "int4" as releases have them: those parameters are then
            `k2jax.ops.lowbit` pytrees.
    """
    forms = low_bit_parts.forms_of(specs, weights)
    return {name: abstract_parameter(leaf, forms[name], dtype) for name, leaf in specs.items()}


def abstract_parameter(leaf: ParamSpec, form: str, dtype: str) -> Any:
    """Describe one parameter; `form` is "plain", "fp8" or "int4", `dtype` that of a plain one."""

    def describe(part: str, leaf: ParamSpec) -> jax.ShapeDtypeStruct:
        kind = jnp.dtype(leaf.dtype if part else dtype)
        if meshless():
            return jax.ShapeDtypeStruct(leaf.shape, kind)
        layout = jax.NamedSharding(jax.sharding.get_abstract_mesh(), storage_spec(leaf.axes))
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=layout)

    return low_bit_parts.build(leaf, form, describe)
