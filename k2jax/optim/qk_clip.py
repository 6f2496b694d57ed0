"""QK-Clip: shrink the query and key weights of a head whose logits grew past tau."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from k2jax.config import ConfigError
from k2jax.config.schema import LEAST_TAU
from k2jax.optim.checks import number
from k2jax.optim.views import names
from k2jax.params.matrices import KEYS, QUERIES
from k2jax.params.spec import ParamSpec


def clip_factor(logit_max: jax.Array, tau: float) -> jax.Array:
    """What a head's logits are scaled by: tau / logit_max, or 1 at or under tau."""
    return jnp.where(logit_max > tau, tau / jnp.maximum(logit_max, tau), 1.0)


def qk_clip(
    tau: float, specs: Any, *, nope: int | None = None, alpha: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    """Clip after the step: put it last in the chain.

    Per head, with gamma = clip_factor(logit_max, tau): the content part of queries is scaled by
    gamma^alpha, that of keys by gamma^(1 - alpha), the rotary part of queries by gamma. The shared
    rotary key and the values are left alone. Logits of the same inputs under otherwise equal
    weights are then scaled by gamma. Momentum is not touched.

    On one's own attention, with queries and keys of one layer, [embed, heads, width]:

        head = lambda kind: ParamSpec(("embed", "heads", kind), (512, 8, 64), 1, "muon")
        specs = {"q": head("qk"), "k": head("k"), "v": Matrices((0,), (1, 2)), "norm": "adam"}
        tx = muonclip(2e-2, specs=specs, tau=100.0)
        updates, state = tx.update(grads, state, params, logit_max=largest)  # [1, 8]

    Args:
        tau: largest logit a head may reach before it is shrunk (K2: 100).
        specs: tree of the parameters' names. `ParamSpec`s whose axes end in ("heads", "qk") are
            queries, ("heads", "kv") keys with values after them, ("heads", "k") keys alone. A
            leading stack is layers from `first_layer`. Everything else is left alone.
        nope: width of the content part; None: all of it, as in plain multi-head attention.
        alpha: share of the shrinking that queries take.

    Returns:
        A transform whose `update` needs `params` (float32 masters) and `logit_max`, float32
        [layers, heads]: the largest logit, signed and softmax scale included, of the forward pass
        that produced the gradient, over the whole batch.

    Raises:
        ConfigError: tau or alpha out of range, no queries or no keys, or fewer layers or other
            heads than `logit_max` has.

    Source: [K2-TR] sec. 2.1, algorithm 1.
    """
    number("tau", tau, low=LEAST_TAU)
    number("alpha", alpha, high=1)
    kinds = {
        name: spec.axes[-2:]
        for name, spec in names(specs).items()
        if isinstance(spec, ParamSpec) and spec.axes[-2:] in QUERIES + KEYS
    }
    for kind, known in (("queries", QUERIES), ("keys", KEYS)):
        if not set(kinds.values()) & set(known):
            raise ConfigError(f"qk_clip finds no {kind}: no spec's axes end in {known[0]}")

    def update(updates, state, params=None, *, logit_max=None, **_):
        if params is None or logit_max is None:
            raise ValueError("qk_clip needs tx.update(grads, state, params, logit_max=...)")
        gamma_LH, weights, spec = (
            clip_factor(jnp.asarray(logit_max), tau),
            names(params),
            names(specs),
        )

        def rescale(name: str, u: jax.Array) -> jax.Array:
            if name not in kinds:
                return u
            gamma = _of_layers(name, gamma_LH, spec[name], u.shape)
            query = kinds[name] in QUERIES
            rest = gamma if query else 1.0
            content = jnp.arange(u.shape[-1]) < (u.shape[-1] if nope is None else nope)
            scale = jnp.where(content, gamma ** (alpha if query else 1 - alpha), rest)
            # Exactly u where nothing is clipped.
            return u + ((scale - 1) * (weights[name] + u)).astype(u.dtype)

        leaves, tree = jax.tree.flatten(updates)
        ready = [rescale(name, u) for name, u in zip(names(updates), leaves, strict=True)]
        return jax.tree.unflatten(tree, ready), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _of_layers(
    name: str, gamma_LH: jax.Array, spec: ParamSpec, shape: tuple[int, ...]
) -> jax.Array:
    """The factors of this leaf's layers, against [layers, in, heads, width]."""
    layers = shape[0] if spec.stacked else 1
    last = spec.first_layer + layers
    if gamma_LH.ndim != 2 or gamma_LH.shape[0] < last or gamma_LH.shape[1] != shape[-2]:
        raise ConfigError(
            f"logit_max has shape {gamma_LH.shape}; {name!r} needs [layers, heads] of at least"
            f" {last} layers and {shape[-2]} heads"
        )
    gamma = gamma_LH[spec.first_layer : last]
    between = (1,) * (len(shape) - spec.stacked - 2)
    return gamma.reshape(*gamma.shape[: spec.stacked], *between, shape[-2], 1)
