"""QK-Clip: shrink the query and key weights of a head whose logits grew past tau."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from k2jax.spec import ParamSpec


def shrink(logit_max: jax.Array, tau: float) -> jax.Array:
    """What a head's logits are scaled by: tau / logit_max, or 1 at or under tau."""
    return jnp.where(logit_max > tau, tau / jnp.maximum(logit_max, tau), 1.0)


def qk_clip(
    tau: float, specs: Mapping[str, ParamSpec], *, nope: int
) -> optax.GradientTransformationExtraArgs:
    """Clip after the step: put it last in the chain.

    Per head, with gamma = shrink(logit_max, tau): the content part of queries and keys is scaled by
    sqrt(gamma), the rotary part of queries by gamma. The shared rotary key and the values are left
    alone. Logits of the same inputs under otherwise equal weights are then scaled by gamma.

    Args:
        tau: largest logit a head may reach before it is shrunk (K2: 100).
        specs: of the parameters. Leaves with axes (..., "heads", "qk") are queries, those with
            (..., "heads", "kv") keys and values; the leading stack is layers from `first_layer`.
        nope: width of the content part.

    Returns:
        A transform whose `update` needs `params` and `logit_max`, float32 [layers, heads]: the
        largest logit, softmax scale included, of the forward pass that produced the gradient.

    Source: [K2-TR] sec. 2.1, algorithm 1, alpha = 1/2.
    """

    def update(updates, state, params=None, *, logit_max=None, **_):
        if params is None or logit_max is None:
            raise ValueError("qk_clip needs tx.update(grads, state, params, logit_max=...)")
        gamma_LH = shrink(logit_max, tau)

        def rescale(name: str, u: jax.Array) -> jax.Array:
            spec = specs[name]
            kind = spec.axes[-2:]
            if kind not in (("heads", "qk"), ("heads", "kv")):
                return u
            gamma_LH_here = gamma_LH[spec.first_layer : spec.first_layer + spec.shape[0]]
            gamma = gamma_LH_here[:, None, :, None]  # against [layers, in, heads, width]
            content = jnp.arange(u.shape[-1]) < nope
            rest = gamma if kind == ("heads", "qk") else 1.0
            scale = jnp.where(content, jnp.sqrt(gamma), rest)
            w = params[name]
            return u + ((scale - 1) * (w + u)).astype(u.dtype)  # exactly u where nothing is clipped

        return {name: rescale(name, u) for name, u in updates.items()}, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
