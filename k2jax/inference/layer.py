"""One layer over chunks of sequences whose earlier tokens lie in pages of latents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.inference.paged_attention import Chunks, absorb_queries, attend_pages, project_values
from k2jax.model.attention import project_latents
from k2jax.model.mlp import gated_mlp
from k2jax.model.moe import moe_for_inference
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy
from k2jax.model.rope import Rotation, rotation
from k2jax.params.kimi import Layer
from k2jax.sharding import reshard


class Reading(NamedTuple):
    """The chunks of a call, and what every layer needs to know of them."""

    chunks: Chunks
    turn: Rotation
    valid_BT: jax.Array  # bool, whether there is a token
    first: int = 0  # place of a sequence from which on it is attended to


def describe(chunks: Chunks, cfg: ModelConfig) -> Reading:
    """Compute what layers share."""
    order_T = jnp.arange(chunks.token_BT.shape[1])
    valid_BT = order_T < chunks.count_B[:, None]
    turn = rotation(reshard(chunks.start_B[:, None] + order_T, "batch", "length"), cfg)
    return Reading(chunks, turn, reshard(valid_BT, "batch", "length"))


def apply_layer(
    w: Layer,
    index: tuple[jax.Array, bool],
    x_BTD: jax.Array,
    latents: jax.Array,
    reading: Reading,
    cfg: ModelConfig,
    policy: Policy,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Apply one layer: activations, its latents with those of the chunks, and chosen experts.

    Args:
        w: weights of the layer, but for the experts, which are those of its stack.
        index: of the layer in its stack; whether `latents` are those of the whole stack too.
        x_BTD: activations.
        latents: of earlier tokens.
        reading: the chunks.
        cfg: sizes.
        policy: dtypes, and how weights are read.

    Returns:
        The third is int32 [chunks, tokens, experts a token]; None: the layer has none.
    """
    at = index[0] if index[1] else None
    u_BTD = rms_norm(x_BTD, w.attention_norm, cfg.norm_eps, policy)
    new_BTM = latents_of(w, u_BTD, reading, cfg, policy)
    q_BHTM, up = absorb_queries(w.attention, u_BTD, reading.turn, cfg, policy)
    mixed_BHTR, latents = attend_pages(
        q_BHTM, new_BTM, latents, at, reading.chunks, cfg, reading.first
    )
    x_BTD += project_values(w.attention, mixed_BHTR, up, cfg, policy)
    u_BTD = rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps, policy)
    if hasattr(w, "moe"):
        y_BTD, expert_BTK = moe_for_inference(w.moe, index[0], u_BTD, reading.valid_BT, cfg, policy)
    else:
        y_BTD, expert_BTK = gated_mlp(w.mlp, u_BTD, policy), None
    return x_BTD + y_BTD, latents, expert_BTK


def latents_of(
    w: Any, u_BTD: jax.Array, reading: Reading, cfg: ModelConfig, policy: Policy
) -> jax.Array:
    """Compute the latents that a layer stores, `new_BTM`, from its normed input."""
    return jnp.concatenate(project_latents(w.attention, u_BTD, reading.turn, cfg, policy), axis=-1)
