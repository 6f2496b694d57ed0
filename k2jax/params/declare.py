"""Declare parameters: one line gives shape, layout, init, optimizer group and published name.

Parameters travel as one flat dict of arrays with dotted names ("moe.attention.q_up"). The nnx
modules in `model/` only declare; `specs` reads their declarations, `initial` draws the arrays,
`bind` puts arrays back under the modules' attributes.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k2jax.config import ModelConfig
from k2jax.params.spec import ParamSpec
from k2jax.sharding import meshless, storage_spec

Params = dict[str, jax.Array]
Module = TypeVar("Module", bound=nnx.Module)


class RouterBias(nnx.Variable):
    """Steers the choice of experts: moved by counts, never by gradients [DSV3-TR 2.1.2]."""


class Declare:
    """Declares the parameters of one module: `declare("q_latent heads qk", 1, "q_b_proj")`.

    Args:
        cfg: gives each axis its length.
        stack: axis that stacks layers of this kind, or "" for what stands alone.
        prefix: start of the published names.
    """

    def __init__(self, cfg: ModelConfig, stack: str = "", prefix: str = ""):
        self.cfg, self.stack, self.prefix = cfg, stack, prefix

    def __call__(
        self, axes: str, contracted: int, published: str, init: str = "",
        copies: tuple[str, ...] = (),
    ) -> nnx.Param:  # fmt: skip
        """A parameter whose first `contracted` matrix dims meet the input.

        0 means no matrix: a gain (`init` "ones", the default) or a table of rows ("normal").
        """
        names = tuple(axes.split())
        group = "muon" if contracted and "vocab" not in names else "adam"
        return self._declare(
            nnx.Param, names, contracted, f"{published}.weight", group,
            init or ("normal" if contracted else "ones"), copies,
        )  # fmt: skip

    def bias(self, axes: str, published: str) -> RouterBias:
        """A float32 bias outside of gradients and weight decay."""
        return self._declare(RouterBias, tuple(axes.split()), 0, published, "bias", "zeros")

    def _declare(self, kind, axes, contracted, published, group, init, copies=()):
        before = {"moe_layers": self.cfg.dense_layers, "mtp_layers": self.cfg.layers}
        axes = (self.stack, *axes) if self.stack else axes
        leaf = ParamSpec(
            axes=axes,
            shape=tuple(map(self.cfg.size, axes)),
            contracted=contracted,
            group=group,
            published=self.prefix + published,
            dtype="float32" if group == "bias" else "bfloat16",
            first_layer=before.get(self.stack, 0),
            init=init,
            copies=copies,
        )
        abstract = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        # `out_sharding` is Flax's own annotation; the arrays are placed by `initial`.
        return kind(abstract, out_sharding=axes, eager_sharding=False, spec=leaf)


def specs(module: nnx.Module) -> dict[str, ParamSpec]:
    """Name and declaration of every parameter."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): leaf.get_metadata("spec") for path, leaf in flat}


def bind(module: Module, params: Mapping[str, jax.Array], grad_dtype: str | None = None) -> Module:
    """The module with `params` in the place of its declarations.

    Args:
        module: declarations.
        params: arrays by name; more than it declares do not matter.
        grad_dtype: what gradients of weights travel in between devices; None: the dtype they have.

    Raises:
        KeyError: a parameter is missing.
    """
    graph, state = nnx.split(module)
    flat = [
        (path, leaf.replace(params[".".join(map(str, path))], grad_dtype=grad_dtype))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def initial(specs: Mapping[str, ParamSpec], seed: int, std: float) -> Params:
    """Draw float32 parameters, each device only its part, without compiling anything.

    Every matrix is drawn by NumPy from (seed, name, layer, expert), so the weights are the same
    on any mesh and any number of hosts.

    Args:
        specs: what to draw.
        seed: of the run.
        std: standard deviation of the normal ones; gains are 1, the router bias 0.
    """
    return {name: _draw(name, leaf, seed, std) for name, leaf in specs.items()}


def _draw(name: str, leaf: ParamSpec, seed: int, std: float) -> jax.Array:
    @functools.cache
    def matrix(index: tuple[int, ...]) -> np.ndarray:
        inner = leaf.shape[leaf.stacked :]
        if leaf.init != "normal":
            return np.full(inner, leaf.init == "ones", np.float32)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), *index])
        return rng.standard_normal(inner, np.float32) * np.float32(std)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = [range(n)[cut] for n, cut in zip(leaf.stack, index, strict=False)]
        shape = tuple(len(range(n)[cut]) for n, cut in zip(leaf.shape, index, strict=True))
        out = np.empty(shape, np.float32)
        for at in np.ndindex(*map(len, ranges)):
            where = tuple(r[i] for r, i in zip(ranges, at, strict=True))
            out[at] = matrix(where)[index[leaf.stacked :]]
        return out

    if meshless():
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), storage_spec(leaf.axes))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def abstract(
    specs: Mapping[str, ParamSpec], dtype: str = "float32"
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and layout of every parameter on the mesh in use, real or pretended."""
    if meshless():
        return {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in specs.items()}
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, dtype, sharding=jax.NamedSharding(mesh, storage_spec(leaf.axes))
        )
        for name, leaf in specs.items()
    }
