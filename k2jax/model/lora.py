"""Weights with adapters, put together for the network and taken as plain arrays."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from k2jax.model.projection import Adapted, values
from k2jax.params.adapters import A, B, adapted_names, is_adapter
from k2jax.params.arrays import Params
from k2jax.params.spec import ParamSpec


def attach_adapters(params: Params, scale: float) -> Params:
    """Put each adapter into its weight: what `k2jax.params.arrays.bind` takes.

    Args:
        params: weights, and adapters under names of their own.
        scale: of the adapters, alpha / rank.
    """
    plain = {name: stored for name, stored in params.items() if not is_adapter(name)}
    pairs = {
        name: Adapted(plain[name], params[name + A], params[name + B], scale)
        for name in adapted_names(params)
    }
    return plain | pairs


def merge_adapters(params: Params, specs: Mapping[str, ParamSpec], scale: float) -> Params:
    """Add each adapter to its weight, for what knows weights only.

    A low-bit weight that has an adapter becomes bfloat16; every other one is passed on.

    Args:
        params: weights and adapters.
        specs: of the weights.
        scale: of the adapters.
    """
    return {
        name: _merge(stored, specs[name]) if isinstance(stored, Adapted) else stored
        for name, stored in attach_adapters(params, scale).items()
    }


@functools.partial(jax.jit, static_argnames="leaf")
def _merge(stored: Adapted, leaf: ParamSpec) -> jax.Array:
    base: Any = stored.base
    dtype = base.dtype if isinstance(base, jax.Array) else jnp.bfloat16
    return values(stored, leaf).astype(dtype)
