"""The whole network: embed, layers, head."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from k2jax.config import ModelConfig
from k2jax.model.attention import attend
from k2jax.model.batch import Batch
from k2jax.model.mlp import gated
from k2jax.model.moe import RouterStats, mixture
from k2jax.model.norm import rms_norm
from k2jax.model.projection import PROJECTION, Policy, look_up
from k2jax.model.rope import Rotation, rotation
from k2jax.params.kimi import Kimi, Layer

INPUT = "layer input"  # name of what a layer is given, for rematerialisation policies
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION),
    # Layers are made again from inputs that wait in the host's memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Aux(NamedTuple):
    """What the optimizer and the metrics need to know of a forward pass."""

    logit_max: jax.Array  # float32 [layers, heads], dense layers first, MTP layers last
    load: jax.Array  # float32 [moe_layers + mtp_layers, experts], choices that fell on each
    aux_loss: jax.Array  # float32 scalar, mean over layers, before its weight
    dropped: jax.Array  # float32 scalar, share of all choices of experts without room
    metrics: dict[str, jax.Array]  # float32 scalars of an objective; they add up over micro-batches


def hidden(w: Kimi, batch: Batch, cfg: ModelConfig, policy: Policy) -> tuple[jax.Array, Aux]:
    """Normed activations `x_BTD` before the head, and what the optimizer needs.

    Args:
        w: weights.
        batch: rows of tokens; targets and weights are not looked at.
        cfg: sizes.
        policy: dtypes, rematerialisation and dispatch.
    """
    turn = rotation(batch.position, cfg)
    x_BTD = embedded(w, batch.token, policy)

    def dense(x_BTD: jax.Array, layer: Layer):
        x_BTD, top_H = _attended(layer, x_BTD, turn, batch.segment, cfg, policy)
        u_BTD = rms_norm(x_BTD, layer.mlp_norm, cfg.norm_eps, policy)
        y_BTD = gated(layer.mlp, u_BTD, policy)
        return x_BTD + y_BTD, top_H

    def sparse(x_BTD: jax.Array, layer: Layer):
        return mixed(layer, x_BTD, turn, batch.segment, cfg, policy)

    wrap = recomputed(policy.remat)
    top_LH = jnp.zeros((0, cfg.heads), jnp.float32)
    if cfg.dense_layers:
        x_BTD, top_LH = jax.lax.scan(wrap(dense), x_BTD, w.dense)
    x_BTD, (top, balance) = jax.lax.scan(wrap(sparse), x_BTD, w.layers)
    tops = jnp.concatenate([top_LH, top])
    aux = Aux(tops, balance.load_E, balance.aux.mean(), balance.dropped.mean(), {})
    return rms_norm(x_BTD, w.norm, cfg.norm_eps, policy), aux


def embedded(w: Kimi, token_BT: jax.Array, policy: Policy) -> jax.Array:
    """The tokens' embeddings `x_BTD`."""
    return look_up(w.embed, token_BT, policy)


def mixed(
    layer: Layer,
    x_BTD: jax.Array,
    turn: Rotation,
    segment_BT: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
) -> tuple[jax.Array, tuple[jax.Array, RouterStats]]:
    """One layer with routed experts: `x_BTD`, each head's largest logit, and the balance."""
    x_BTD, top_H = _attended(layer, x_BTD, turn, segment_BT, cfg, policy)
    u_BTD = rms_norm(x_BTD, layer.mlp_norm, cfg.norm_eps, policy)
    y_BTD, balance = mixture(layer.moe, u_BTD, segment_BT, cfg, policy)
    return x_BTD + y_BTD, (top_H, balance)


def recomputed(remat: str) -> Callable[..., Any]:
    """What wraps a layer so that the backward pass makes again what `remat` says."""
    if remat == "none":
        return lambda layer: layer
    return functools.partial(jax.checkpoint, policy=POLICIES[remat])


def _attended(layer: Layer, x_BTD, turn, segment_BT, cfg, policy):
    x_BTD = checkpoint_name(x_BTD, INPUT)
    normed = rms_norm(x_BTD, layer.attention_norm, cfg.norm_eps, policy)
    y_BTD, top_H = attend(layer.attention, normed, turn, segment_BT, cfg, policy)
    return x_BTD + y_BTD, top_H
