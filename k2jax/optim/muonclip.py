"""MuonClip: the whole recipe of K2, and AdamW to compare it with."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from k2jax.config import ConfigError
from k2jax.config.schema import LEAST_EPS
from k2jax.optim.checks import number
from k2jax.optim.muon import scale_by_muon
from k2jax.optim.qk_clip import qk_clip
from k2jax.optim.views import assign


def muonclip(  # noqa: PLR0913, the recipe's numbers are its interface
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Any = None,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    ns_dtype: str = "bfloat16",
    adam: Mapping[str, float] | None = None,
    adam_scale: float = 1.0,
    tau: float | None = None,
    nope: int | None = None,
    alpha: float = 0.5,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices, AdamW for the rest, weight decay for all, then QK-Clip.

    W = W - lr (O + weight_decay W), O Muon's or Adam's direction; both share the learning rate.
    Decay reaches norm gains too, on purpose [ML appendix D].

    Args:
        learning_rate: number or schedule.
        specs: tree of the parameters' names: `ParamSpec`, `Matrices` (Muon) or "adam". None takes
            every array with two dims for a matrix, but embeddings, heads and the like for Adam's.
        weight_decay: times the learning rate.
        momentum: Muon's.
        ns_dtype: of the Newton-Schulz iteration.
        adam: `b1`, `b2`, `eps` of AdamW; 0.9, 0.95, 1e-8 by default.
        adam_scale: of Adam's steps; 1 in K2. Short runs learn faster with more, for embeddings and
            head have further to go than matrices.
        tau: QK-Clip's threshold; then `update` needs `logit_max`, and `specs` must be given. None
            leaves it out.
        nope: width of the content part of queries and keys, for QK-Clip; None: all of it.
        alpha: QK-Clip's share for queries.
        settings: further ones of `scale_by_muon`.

    Raises:
        ConfigError: an argument is missing, or a leaf that is neither assigned nor clearly a
            matrix or Adam's; it is named.

    Source: [K2-TR] algorithm 1; [ML] section 2.
    """
    settings |= settings.pop("settings", {})  # as `optax.inject_hyperparams` hands them on
    number("learning_rate", learning_rate)
    number("weight_decay", weight_decay)
    number("adam_scale", adam_scale)
    if tau is not None and specs is None:
        raise ConfigError(
            "muonclip with tau needs specs: they say which leaves are queries and keys"
        )
    adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8} | dict(adam or {})
    for name in ("b1", "b2"):
        number(f"adam {name}", adam[name], high=1)
    number("adam eps", adam["eps"], low=LEAST_EPS)

    def labels(params: Any) -> Any:
        views = assign(params, specs).values()
        groups = ["adam" if view == "adam" else "muon" for view in views]
        return jax.tree.unflatten(jax.tree.structure(params), groups)

    groups = {
        "muon": scale_by_muon(specs, momentum, ns_dtype, **settings),
        "adam": optax.chain(optax.scale_by_adam(**adam), optax.scale(adam_scale)),
    }
    chain = [
        optax.partition(groups, labels),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if tau is not None:
        chain.append(qk_clip(tau, specs, nope=nope, alpha=alpha))
    rule = optax.chain(*chain)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("muonclip needs params: call tx.update(grads, state, params, ...)")
        return rule.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW over everything, norms decayed too, to compare with."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
