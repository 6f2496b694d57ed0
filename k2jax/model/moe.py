"""Mixture of experts: route, exchange tokens, run the chosen experts, bring the results back.

The one place in the model that sees a single device. Outside, tokens are spread over `expert` like
over any batch axis; inside, each device holds some experts. Tokens of the devices along `expert`
are gathered, each device runs its experts on those that chose them, and the sums are scattered
back. Nothing is ever dropped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.layout import used
from k2jax.model.mlp import Mlp, gated
from k2jax.model.router import Routing, count, route
from k2jax.ops.experts import expert_mlp
from k2jax.params import Declare
from k2jax.sharding import BATCH, meshless, place

# Rows up to which every chosen expert may see all of them (`mixture_of_few`).
FEW = 16


class Experts(nnx.Module):
    """Weights of the routed experts."""

    def __init__(self, cfg: ModelConfig, stack: str):
        declare = Declare(cfg, stack, "model.layers.{l}.mlp.experts.{e}.")
        self.gate = declare("experts expert_embed expert_ffw", 1, "gate_proj")
        self.up = declare("experts expert_embed expert_ffw", 1, "up_proj")
        self.down = declare("experts expert_ffw expert_embed", 1, "down_proj")


class Moe(nnx.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, cfg: ModelConfig, stack: str):
        declare = Declare(cfg, stack, "model.layers.{l}.mlp.")
        self.router = declare("embed router", 1, "gate")
        self.bias = declare.bias("router", "gate.e_score_correction_bias")
        self.experts = Experts(cfg, stack)
        if cfg.shared_experts:
            self.shared = Mlp(cfg, stack, "shared_ffw", "model.layers.{l}.mlp.shared_experts.")


class Balance(NamedTuple):
    """How evenly one layer's experts were used."""

    load_E: jax.Array  # float32, tokens sent to each expert, over the whole batch
    aux: jax.Array  # float32 scalar, sequence-wise balance loss before its weight


def mixture(
    w: Moe, x_BTD: jax.Array, segment_BT: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, Balance]:
    """Weighted sum of each token's experts plus the shared ones; rows with segment 0 count nowhere.

    Source: [JLE] modeling_deepseek.py 520-560.
    """
    dtype = x_BTD.dtype
    weights = tuple(used(leaf, dtype) for leaf in (w.experts.gate, w.experts.up, w.experts.down))
    router = (used(w.router, jnp.float32), w.bias[...])
    if meshless():
        y_BTD, balance = _on_device(x_BTD, segment_BT, *router, *weights, cfg=cfg, mesh=False)
    else:
        rows = P(BATCH, "context")
        wide = P("expert", None, "model")
        body = jax.shard_map(
            lambda *args: _on_device(*args, cfg=cfg, mesh=True),
            in_specs=(rows, rows, P(), P(), wide, wide, P("expert", "model", None)),
            out_specs=(rows, P()),
            check_vma=False,  # loops and custom gradients inside; tests compare with one device
        )
        y_BTD, balance = body(x_BTD, segment_BT, *router, *weights)
    if cfg.shared_experts:
        y_BTD += gated(w.shared, x_BTD)
    return y_BTD, balance


def mixture_of_few(
    w: Moe, experts: Experts, layer: jax.Array, x_BTD: jax.Array, cfg: ModelConfig
) -> jax.Array:
    """`mixture` without its balance, for decoding: weights of experts nobody chose are not read.

    Args:
        w: weights of one layer.
        experts: those of all mixture layers; a layer's own would be copied out of the stack.
        layer: index into them.
        x_BTD: normed activations, few rows. All of them go through every chosen expert, which
            costs nothing while reading the expert's weights takes longer.
        cfg: sizes.
    """
    rows = x_BTD.shape[0] * x_BTD.shape[1]
    if not meshless() or rows > FEW:
        segment_BT = place(jnp.ones(x_BTD.shape[:2], jnp.int32), "batch", "length")
        return mixture(w, x_BTD, segment_BT, cfg)[0]
    x_ND = x_BTD.reshape(rows, -1)
    routing = route(x_ND, used(w.router, jnp.float32), w.bias[...], cfg)
    hit_NKE = routing.expert_NK[..., None] == jnp.arange(cfg.experts)
    weight_NE = jnp.where(hit_NKE, routing.weight_NK[..., None], 0.0).sum(axis=1)
    chosen_E = hit_NKE.any(axis=(0, 1))
    order_E = jnp.argsort(~chosen_E)

    def one(i: jax.Array, y_ND: jax.Array) -> jax.Array:
        expert = order_E[i]
        gate_DF, up_DF, down_FD = (
            leaf[...][layer, expert].astype(x_ND.dtype)
            for leaf in (experts.gate, experts.up, experts.down)
        )
        out_ND = (jax.nn.silu(x_ND @ gate_DF) * (x_ND @ up_DF)) @ down_FD
        return y_ND + out_ND.astype(jnp.float32) * weight_NE[:, expert, None]

    # Combined in float32, then cast, as the published code does.
    y_ND = jax.lax.fori_loop(0, chosen_E.sum(), one, jnp.zeros(x_ND.shape, jnp.float32))
    y_BTD = y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)
    return y_BTD + gated(w.shared, x_BTD) if cfg.shared_experts else y_BTD


def _on_device(x_BTD, segment_BT, w_DE, bias_E, *weights, cfg: ModelConfig, mesh: bool):
    """One device's share of the layer. `weights` are gate_eDF, up_eDF and down_eFD."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(x_ND, w_DE, bias_E, cfg)
    balance = _balance(routing, segment_BT, cfg, mesh)
    if mesh:
        gather = lambda a: jax.lax.all_gather(a, "expert", tiled=True)
        x_ND, expert_NK, weight_NK = map(gather, (x_ND, routing.expert_NK, routing.weight_NK))
        first = jax.lax.axis_index("expert") * weights[0].shape[0]
        y_ND = expert_mlp(x_ND, expert_NK - first, weight_NK, weights)
        y_ND = jax.lax.psum_scatter(y_ND, "expert", tiled=True)
        y_ND = jax.lax.psum(y_ND, "model")  # each device has a share of the hidden width
    else:
        y_ND = expert_mlp(x_ND, routing.expert_NK, routing.weight_NK, weights)
    return y_ND.reshape(x_BTD.shape), balance


def _balance(routing: Routing, segment_BT: jax.Array, cfg: ModelConfig, mesh: bool) -> Balance:
    """Load over the whole batch, and the sequence-wise loss [DSV3-TR 2.1.2].

    For each row: sum over experts of f P, f the expert's share of choices times experts, P its
    mean normalised score. 1 when perfectly even; the mean over rows is returned.
    """
    valid_BT = segment_BT > 0
    total = lambda a, axes: jax.lax.psum(a, axes) if mesh else a
    load_E = count(routing.expert_NK, valid_BT.reshape(-1), cfg.experts)

    rows = lambda a: a.reshape(*segment_BT.shape, -1)
    hit_BTE = (rows(routing.expert_NK)[..., None] == jnp.arange(cfg.experts)).any(axis=2)
    share_BTE = rows(routing.score_NE / routing.score_NE.sum(axis=-1, keepdims=True))
    keep = valid_BT[..., None]
    length_B1 = total(valid_BT.sum(axis=1, keepdims=True, dtype=jnp.float32), "context")
    f_BE = total((hit_BTE & keep).sum(axis=1, dtype=jnp.float32), "context")
    p_BE = total(jnp.where(keep, share_BTE, 0.0).sum(axis=1), "context")
    scale_B1 = cfg.experts / cfg.experts_per_token / jnp.maximum(length_B1, 1.0) ** 2
    aux_B = (jax.lax.stop_gradient(f_BE) * p_BE * scale_B1).sum(axis=1)
    some_B = (length_B1[:, 0] > 0).astype(jnp.float32)
    aux = total((aux_B * some_B).sum(), BATCH) / jnp.maximum(total(some_B.sum(), BATCH), 1.0)
    return Balance(total(load_E, (*BATCH, "context")), aux)
