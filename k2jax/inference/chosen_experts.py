"""The routed experts of few rows: only the weights of those that a row chose are read."""

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.model.mlp import gated_mlp
from k2jax.model.moe import moe_for_inference, router_logits
from k2jax.model.projection import Policy, read_weight
from k2jax.model.router import route
from k2jax.ops.moe.permute import sort_by_expert
from k2jax.ops.moe.tiles import cut_into_tiles
from k2jax.params.kimi import Moe
from k2jax.sharding import meshless

# Rows of one expert that are multiplied at a time: few rows leave most of a block empty, and many
# would read an expert's weights too often.
FEW_ROWS, MANY_ROWS = 4, 32
SMALL_BATCH_TOKENS = 16


def run_experts(
    w: Moe,
    layer: jax.Array,
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
) -> jax.Array:
    """Sum each token's experts by weight and add the shared ones.

    Args:
        w: weights of one layer, but for the experts: they would be copied out of the stack.
        layer: index into the experts, which are those of the whole stack.
        x_BTD: normed activations.
        valid_BT: whether a token is one; padding chooses no expert.
        cfg: sizes.
        policy: how weights are read.
    """
    if not meshless():
        return moe_for_inference(w, w.experts, layer, x_BTD, valid_BT, cfg, policy)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    logit_NE = router_logits(w, x_BTD, policy).reshape(len(x_ND), -1)
    routing = route(logit_NE, read_weight(w.bias, policy, "float32"), cfg)
    expert_NK = jnp.where(valid_BT.reshape(-1, 1), routing.expert_NK, cfg.experts)
    y_ND = _run_blocks(x_ND, expert_NK, routing.weight_NK, w.experts, layer, cfg, policy)
    y_BTD = y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)
    return y_BTD + gated_mlp(w.shared, x_BTD, policy) if cfg.shared_experts else y_BTD


def _run_blocks(x_ND, expert_NK, weight_NK, experts, layer, cfg, policy) -> jax.Array:
    """Run the pairs of token and choice, sorted by expert, in blocks; float32 sums of each token.

    A block may extend into the next expert's pairs: what it writes into them, that expert
    overwrites, and what comes after the last one is never read.
    """
    order_M, place_M, size_E, weight_NK = sort_by_expert(expert_NK, weight_NK, cfg.experts)
    rows = FEW_ROWS if len(x_ND) <= SMALL_BATCH_TOKENS else MANY_ROWS
    most = order_M.size // rows + min(cfg.experts, order_M.size)
    expert_I, first_I, _ = cut_into_tiles(size_E, rows, most)
    token_M = jnp.pad(order_M, (0, rows)) // cfg.experts_per_token

    def run_block(i: jax.Array, y_MD: jax.Array) -> jax.Array:
        first = first_I[i]
        gate_DF, up_DF, down_FD = (
            read_weight(leaf, policy, index=(layer, expert_I[i]))
            for leaf in (experts.gate, experts.up, experts.down)
        )
        x_GD = x_ND[jax.lax.dynamic_slice_in_dim(token_M, first, rows)]
        y_GD = (jax.nn.silu(x_GD @ gate_DF) * (x_GD @ up_DF)) @ down_FD
        return jax.lax.dynamic_update_slice_in_dim(y_MD, y_GD, first, axis=0)

    y_MD = jnp.zeros((token_M.size, x_ND.shape[1]), x_ND.dtype)
    y_MD = jax.lax.fori_loop(0, (-(-size_E // rows)).sum(), run_block, y_MD)
    # Rows of padding have weight 0, and what they chose was never computed.
    y_NKD = y_MD[place_M].reshape(*weight_NK.shape, -1).astype(jnp.float32)
    # Combined in float32, then cast, as the published code does.
    return (y_NKD * weight_NK[..., None]).sum(axis=1)
