"""MuonClip: the whole recipe of K2, and AdamW to compare it with."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from k2jax.optim.muon import scale_by_muon
from k2jax.optim.qk_clip import qk_clip
from k2jax.spec import ParamSpec


def muonclip(  # noqa: PLR0913, the recipe's numbers are its interface
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Mapping[str, ParamSpec] | None = None,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    ns_dtype: str = "bfloat16",
    adam: Mapping[str, float] | None = None,
    tau: float | None = None,
    nope: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices, AdamW for the rest, weight decay for all, then QK-Clip.

    W = W - lr (O + weight_decay W), O Muon's or Adam's direction; both share the learning rate.
    Decay reaches norm gains too, on purpose [ML appendix D].

    Args:
        learning_rate: number or schedule.
        specs: of each leaf of a flat parameter dict; None takes every array with two dims for a
            matrix and everything else for Adam, in a dict of any parameters.
        weight_decay: times the learning rate.
        momentum: Muon's.
        ns_dtype: of the Newton-Schulz iteration.
        adam: `b1`, `b2`, `eps` of AdamW; 0.9, 0.95, 1e-8 by default.
        tau: QK-Clip's threshold; then `update` needs `logit_max`, and `specs` must be given. None
            leaves it out.
        nope: width of the content part of queries and keys, for QK-Clip.

    Raises:
        ValueError: an argument is missing, or a leaf that is neither a matrix nor clearly Adam's.

    Source: [K2-TR] algorithm 1; [ML] section 2.
    """
    if tau is not None and specs is None:
        raise ValueError(
            "muonclip with tau needs specs: they say which leaves are queries and keys"
        )

    def rule(params: optax.Params) -> optax.GradientTransformationExtraArgs:
        return _recipe(_inferred(params) if specs is None else specs)

    def _recipe(specs: Mapping[str, ParamSpec]) -> optax.GradientTransformationExtraArgs:
        groups = {
            "muon": scale_by_muon(specs, momentum, ns_dtype),
            "adam": optax.scale_by_adam(
                **({"b1": 0.9, "b2": 0.95, "eps": 1e-8} | dict(adam or {}))
            ),
        }
        labels = lambda params: {name: specs[name].group for name in params}
        chain = [
            optax.partition(groups, labels),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        ]
        if tau is not None:
            chain.append(qk_clip(tau, specs, nope=nope))
        return optax.chain(*chain)

    def init(params: optax.Params) -> Any:
        return rule(params).init(params)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("muonclip needs params: call tx.update(grads, state, params, ...)")
        return rule(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _inferred(params: Any) -> dict[str, ParamSpec]:
    """Specs of a foreign flat dict: matrices to Muon, vectors to Adam, anything else is named."""
    specs = {}
    for name, leaf in params.items():
        if jnp.ndim(leaf) > 2:
            raise ValueError(
                f"parameter {name!r} has shape {jnp.shape(leaf)}, which is no plain matrix:"
                " give muonclip `specs` that say which dims stack"
            )
        matrix = jnp.ndim(leaf) == 2 and not any(part in name for part in ("embed", "head"))
        specs[name] = ParamSpec(
            axes=("rows", "columns")[: jnp.ndim(leaf)],
            shape=jnp.shape(leaf),
            contracted=int(matrix),
            group="muon" if matrix else "adam",
            published=name,
        )
    return specs


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW over everything, norms decayed too, to compare with."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
