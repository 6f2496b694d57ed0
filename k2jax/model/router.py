"""Choose experts by sigmoid scores; a bias affects the choice only [DSV3-TR 2.1.2]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig


class Choices(NamedTuple):
    """Experts that another pass over the same tokens chose.

    Attributes:
        expert: int [.., experts a token]; -1: unknown. Of the whole network [rows, length,
            layers, experts a token].
        replayed: whether they are used, in place of this pass's own choice.
    """

    expert: jax.Array
    replayed: bool


class Routing(NamedTuple):
    """Experts of each token and their weights."""

    expert_NK: jax.Array  # int32, best first
    weight_NK: jax.Array  # float32, sums to `routed_scale` over K
    score_NE: jax.Array  # float32 in 0..1, before bias


def route(
    logit_NE: jax.Array, bias_E: jax.Array, cfg: ModelConfig, choices: Choices | None = None
) -> Routing:
    """Pick `cfg.experts_per_token` experts for each token.

    Args:
        logit_NE: float32, the tokens' product with the router's weight.
        bias_E: float32, added to the scores for choosing, not for weighting.
        cfg: sizes; with `groups` > 1 a token chooses within its best groups only, those with the
            largest sum of their two best biased scores [DSV3 model.py].
        choices: what another pass chose. Where it is replayed, weights still are those of this
            pass's scores.

    Source: [JLE] modeling_deepseek.py 390-475.
    """
    score_NE = jax.nn.sigmoid(logit_NE)
    choice_NE = jax.lax.stop_gradient(score_NE + bias_E)
    if cfg.groups > 1:
        choice_NE = _mask_groups(choice_NE, cfg)
    _, expert_NK = jax.lax.top_k(choice_NE, cfg.experts_per_token)
    if choices is not None and choices.replayed:
        expert_NK = jnp.where(choices.expert >= 0, choices.expert, expert_NK)
    weight_NK = jnp.take_along_axis(score_NE, expert_NK, axis=-1)
    weight_NK *= cfg.routed_scale / (weight_NK.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_NK, weight_NK, score_NE)


def _mask_groups(choice_NE: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Set scores outside of each token's best groups to minus infinity."""
    choice_NGE = choice_NE.reshape(-1, cfg.groups, cfg.experts // cfg.groups)
    best_NG = jax.lax.top_k(choice_NGE, 2)[0].sum(axis=-1)
    kept_NK = jax.lax.top_k(best_NG, cfg.groups_per_token)[1]
    kept_NG = (kept_NK[..., None] == jnp.arange(cfg.groups)).any(axis=1)
    return jnp.where(kept_NG[..., None], choice_NGE, -jnp.inf).reshape(choice_NE.shape)


def count_differences(
    expert_NK: jax.Array, choices: Choices, valid_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Count known choices of another pass that this one did not make, and all known ones."""
    known_NK = (choices.expert >= 0) & valid_N[:, None]
    shared_NK = (choices.expert[:, :, None] == expert_NK[:, None, :]).any(axis=-1)
    differ_NK = known_NK & ~shared_NK
    return differ_NK.sum(dtype=jnp.float32), known_NK.sum(dtype=jnp.float32)


def count_choices(expert_NK: jax.Array, valid_N: jax.Array, experts: int) -> jax.Array:
    """Count the choices of each expert, float32 [experts]; padding does not count."""
    hit_NKE = expert_NK[..., None] == jnp.arange(experts)
    return (hit_NKE & valid_N[:, None, None]).sum(axis=(0, 1), dtype=jnp.float32)
