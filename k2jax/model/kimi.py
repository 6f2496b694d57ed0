"""The whole network up to the head: embedding, layers, final norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from k2jax.config import ModelConfig
from k2jax.model.attention import attend
from k2jax.model.batch import Batch
from k2jax.model.mlp import gated_mlp
from k2jax.model.moe import RouterStats, moe_forward
from k2jax.model.norm import rms_norm
from k2jax.model.projection import PROJECTION, Policy, look_up
from k2jax.model.rope import Rotation, rotation
from k2jax.model.router import Choices
from k2jax.params.kimi import Kimi, Layer
from k2jax.sharding import is_for_cpu

LAYER_INPUT = "layer input"  # name of every layer's input, for rematerialisation policies
MAX_UNROLLED_LAYERS = 8  # of a stack; the time to compile grows with them
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTION),
    # Layers are recomputed from their inputs, which are kept in the host's memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Aux(NamedTuple):
    """Statistics of a forward pass, for the optimizer and the metrics."""

    logit_max: jax.Array  # float32 [layers, heads], dense layers first, MTP layers last
    load: jax.Array  # float32 [moe_layers + mtp_layers, experts], choices of each expert
    aux_loss: jax.Array  # float32 scalar, mean over layers, before its weight
    dropped: jax.Array  # float32 scalar, share of all choices that were dropped
    metrics: dict[str, jax.Array]  # float32 scalars of an objective; they add up over micro-batches


def hidden(
    w: Kimi, batch: Batch, cfg: ModelConfig, policy: Policy, choices: Choices | None = None
) -> tuple[jax.Array, Aux]:
    """Compute the normed activations `x_BTD` before the head, and the statistics of the pass.

    Args:
        w: weights.
        batch: rows of tokens; targets and weights are not read.
        cfg: sizes.
        policy: dtypes, rematerialisation and dispatch.
        choices: experts that another pass chose, to compare with or to use; the metrics then
            have `experts_differ`, the share of them that are not used here.
    """
    turn = rotation(batch.position, cfg)
    x_BTD = embed_tokens(w, batch.token, policy)

    def dense_layer(x_BTD: jax.Array, layer: Layer):
        x_BTD, top_H = _add_attention(layer, x_BTD, turn, batch.segment, cfg, policy)
        u_BTD = rms_norm(x_BTD, layer.mlp_norm, cfg.norm_eps, policy)
        y_BTD = gated_mlp(layer.mlp, u_BTD, policy)
        return x_BTD + y_BTD, top_H

    def moe_layer(x_BTD: jax.Array, of_layer: tuple[Layer, Any]):
        layer, expert_BTK = of_layer
        theirs = choices and choices._replace(expert=expert_BTK)
        return apply_moe_layer(layer, x_BTD, turn, batch.segment, cfg, policy, theirs)

    top_LH = jnp.zeros((0, cfg.heads), jnp.float32)
    if cfg.dense_layers:
        x_BTD, top_LH = run_stack(dense_layer, x_BTD, w.dense, cfg.dense_layers, policy)
    expert_LBTK = None if choices is None else jnp.moveaxis(choices.expert, -2, 0)
    layers = (w.layers, expert_LBTK)
    x_BTD, (top, stats) = run_stack(moe_layer, x_BTD, layers, cfg.moe_layers, policy)
    tops = jnp.concatenate([top_LH, top])
    metrics = {} if stats.differ is None else {"experts_differ": stats.differ.mean()}
    aux = Aux(tops, stats.load_E, stats.aux.mean(), stats.dropped.mean(), metrics)
    return rms_norm(x_BTD, w.norm, cfg.norm_eps, policy), aux


def embed_tokens(w: Kimi, token_BT: jax.Array, policy: Policy) -> jax.Array:
    """Look up the tokens' embeddings `x_BTD`."""
    return look_up(w.embed, token_BT, policy)


def apply_moe_layer(
    layer: Layer,
    x_BTD: jax.Array,
    turn: Rotation,
    segment_BT: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
    choices: Choices | None = None,
) -> tuple[jax.Array, tuple[jax.Array, RouterStats]]:
    """Apply one layer with routed experts, those of `choices` if it is replayed.

    Returns:
        `x_BTD`; each head's largest logit `top_H` and the router's statistics.
    """
    x_BTD, top_H = _add_attention(layer, x_BTD, turn, segment_BT, cfg, policy)
    u_BTD = rms_norm(x_BTD, layer.mlp_norm, cfg.norm_eps, policy)
    y_BTD, stats = moe_forward(layer.moe, u_BTD, segment_BT, cfg, policy, choices)
    return x_BTD + y_BTD, (top_H, stats)


def run_stack(
    layer: Callable[..., Any], x_BTD: jax.Array, stack: Any, depth: int, policy: Policy
) -> tuple[jax.Array, Any]:
    """Apply the layers of a stack one after the other.

    Args:
        layer: from `x_BTD` and one layer's weights to `x_BTD` and the layer's statistics.
        x_BTD: activations before the first layer.
        stack: weights of all layers.
        depth: number of layers.
        policy: what is recomputed.

    Returns:
        `x_BTD` after the last layer, and the statistics, stacked.

    The program has one layer in a loop. On CPUs a shallow stack is written out instead: what the
    backward pass needs of a layer is then used where it is, not copied into a stack and back.
    """
    written_out = is_for_cpu() and depth <= MAX_UNROLLED_LAYERS and policy.remat == "none"
    return jax.lax.scan(wrap_remat(layer, policy), x_BTD, stack, unroll=depth if written_out else 1)


def wrap_remat(layer: Callable[..., Any], policy: Policy) -> Callable[..., Any]:
    """Wrap a layer so that the backward pass recomputes what `policy.remat` does not keep."""
    if policy.remat == "none":
        return layer
    return jax.checkpoint(layer, policy=REMAT_POLICIES[policy.remat])


def _add_attention(layer: Layer, x_BTD, turn, segment_BT, cfg, policy):
    x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
    normed = rms_norm(x_BTD, layer.attention_norm, cfg.norm_eps, policy)
    y_BTD, top_H = attend(layer.attention, normed, turn, segment_BT, cfg, policy)
    return x_BTD + y_BTD, top_H
