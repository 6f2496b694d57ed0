"""Multiply by a parameter where it rests split: gather it, cast it, contract."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from k2jax.spec import STACK_AXES
from k2jax.sharding import compute_spec, meshless, spec

if TYPE_CHECKING:
    from flax import nnx


def used(w: "nnx.Variable", dtype: jnp.dtype) -> jax.Array:
    """The parameter of one layer in the compute dtype, gathered over what only stores it.

    It is cast before it travels; its gradient travels back in the compute dtype too.
    """
    value = w[...].astype(dtype)
    if meshless():
        return value
    axes = [axis for axis in w.get_metadata("spec").axes if axis not in STACK_AXES[:2]]
    return jax.reshard(value, compute_spec(axes))


def project(
    einsum: str, x: jax.Array, w: "nnx.Variable", axes: tuple[str | None, ...]
) -> jax.Array:
    """`x` contracted with a parameter, in `x`'s dtype, laid out by the result's logical `axes`."""
    return jnp.einsum(einsum, x, used(w, x.dtype), out_sharding=spec(*axes))
