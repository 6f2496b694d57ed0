"""Mixture of experts: route, send tokens to their experts, run these, send the results back.

Outside of this module tokens are split over the mesh axis `expert` as over any batch axis; in it,
each device holds some of the experts, and `ops.moe` dispatches tokens to them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.mlp import gated_mlp
from k2jax.model.projection import (
    Policy,
    gathered_spec_of,
    read_stack,
    read_weight,
    sharded_einsum,
    specs_of,
)
from k2jax.model.router import Choices, Routing, count_choices, count_differences, route
from k2jax.ops.collectives import gather_over, sum_over
from k2jax.ops.lowbit import LowBit, decode
from k2jax.ops.moe import (
    Dispatch,
    dispatch_allgather,
    dispatch_alltoall,
    dispatch_to_resident,
    expert_mlp,
    fuse_gate_up,
    gather_low_bit,
    resident_mlp,
)
from k2jax.params.kimi import Moe
from k2jax.sharding import axes_of, meshless, spec, storage_spec


class RouterStats(NamedTuple):
    """Statistics of one layer's router."""

    load_E: jax.Array  # float32, tokens sent to each expert, over the whole batch
    aux: jax.Array  # float32 scalar, sequence-wise balance loss before its weight
    dropped: jax.Array  # float32 scalar, share of all choices that were dropped
    # float32 scalar, share of another pass's choices that are not made; None: there is none.
    differ: jax.Array | None = None


def router_logits(w: Moe, x_BTD: jax.Array, policy: Policy) -> jax.Array:
    """Compute `logit_BTE` in float32, whatever the compute dtype; so is the weight's gradient."""
    w_DE, out_spec = read_weight(w.router, policy, "float32"), spec("batch", "length", None)
    x_BTD = x_BTD.astype(jnp.float32)
    return sharded_einsum("btd,de->bte", out_spec, gathered_spec_of(w.router), None, x_BTD, w_DE)


def moe_forward(
    w: Moe,
    x_BTD: jax.Array,
    segment_BT: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
    choices: Choices | None = None,
) -> tuple[jax.Array, RouterStats]:
    """Sum each token's experts by weight and add the shared ones; segment 0 counts nowhere.

    With the `choices` of another pass, `expert` [rows, length, experts a token], these are
    compared with this pass's, or replayed.

    Source: [JLE] modeling_deepseek.py 520-560.
    """
    choice = (router_logits(w, x_BTD, policy), read_weight(w.bias, policy, "float32"))
    leaves = (w.experts.gate, w.experts.up, w.experts.down)
    weights = tuple(read_stack(leaf, policy) for leaf in leaves)
    if meshless():
        y_BTD, stats = _run_on_device(x_BTD, segment_BT, choices, *choice, *weights, cfg=cfg)
    else:
        token_spec = storage_spec(("batch", "length"))
        replayed = choices is not None and choices.replayed

        def on_device(x_BTD, segment_BT, expert_BTK, *args):
            choices = None if expert_BTK is None else Choices(expert_BTK, replayed)
            return _run_on_device(x_BTD, segment_BT, choices, *args, cfg=cfg, policy=policy)

        body = jax.shard_map(
            on_device,
            in_specs=(
                token_spec,
                token_spec,
                token_spec,
                token_spec,
                P(),
                *specs_of(weights),
            ),
            out_specs=(token_spec, P()),
            check_vma=False,  # loops and custom gradients inside; tests compare with one device
        )
        y_BTD, stats = body(x_BTD, segment_BT, choices and choices.expert, *choice, *weights)
    if cfg.shared_experts:
        y_BTD += gated_mlp(w.shared, x_BTD, policy)
    return y_BTD, stats


def moe_for_inference(
    w: Moe,
    layer: jax.Array,
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
) -> tuple[jax.Array, jax.Array]:
    """Compute `moe_forward` without statistics; weights of experts nobody chose are not read.

    Args:
        w: weights of one layer, but for the experts, which are those of all layers of the stack:
            one layer's would be copied out of it.
        layer: int32, index into the experts.
        x_BTD: normed activations.
        valid_BT: whether a token is one; others choose no expert.
        cfg: sizes.
        policy: how weights are read.

    Returns:
        The sum, and the experts of each token, int32 [rows, length, experts a token].
    """

    def on_device(x_BTD, valid_BT, logit_BTE, bias_E, layer, *stacks):
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = route(logit_BTE.reshape(len(x_ND), -1), bias_E, cfg)
        expert_NK = jnp.where(valid_BT.reshape(-1, 1), routing.expert_NK, cfg.experts)
        hidden = () if meshless() else axes_of("expert_ffw")

        def run(x_MD, weight_M1, size_E):
            return resident_mlp(x_MD, weight_M1, stacks, layer, size_E, hidden)

        y_ND = dispatch_to_resident(x_ND, expert_NK, routing.weight_NK, cfg.experts, run)
        chosen_BTK = routing.expert_NK.reshape(*valid_BT.shape, -1)
        return sum_over(y_ND, hidden).reshape(x_BTD.shape), chosen_BTK

    leaves = (w.experts.gate, w.experts.up, w.experts.down)
    stacks = tuple(read_stack(leaf, policy) for leaf in leaves)
    choice = (router_logits(w, x_BTD, policy), read_weight(w.bias, policy, "float32"))
    if meshless():
        y_BTD, expert_BTK = on_device(x_BTD, valid_BT, *choice, layer, *stacks)
    else:
        rows, tokens = (storage_spec(("batch", "length", *more)) for more in ((), (None,)))
        body = jax.shard_map(
            on_device,
            in_specs=(tokens, rows, tokens, P(), P(), *specs_of(stacks)),
            out_specs=(tokens, tokens),
            check_vma=False,  # loops whose length differs between devices
        )
        y_BTD, expert_BTK = body(x_BTD, valid_BT, *choice, layer, *stacks)
    if cfg.shared_experts:
        y_BTD += gated_mlp(w.shared, x_BTD, policy)
    return y_BTD, expert_BTK


def _run_on_device(
    x_BTD,
    segment_BT,
    choices: Choices | None,
    logit_BTE,
    bias_E,
    *weights,
    cfg: ModelConfig,
    policy: Policy | None = None,
):
    """Run one device's share of the layer. `weights` are gate_eDF, up_eDF and down_eFD.

    With a `policy` there is a mesh.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    if choices is not None:
        choices = choices._replace(expert=choices.expert.reshape(len(x_ND), -1))
    routing = route(logit_BTE.reshape(len(x_ND), -1), bias_E, cfg, choices)
    chosen, dropped = (x_ND, routing.expert_NK, routing.weight_NK), jnp.zeros(())
    if isinstance(weights[0], LowBit):
        y_ND = _run_low_bit(*chosen, weights, cfg.experts, policy)
    elif policy is None:
        y_ND = expert_mlp(*chosen, fuse_gate_up(*weights))
    else:
        gate_up_eDG, down_eFD = fuse_gate_up(*weights)
        if axes := storage_spec(("expert_embed",))[0]:
            # Gathered on the device, so that their gradients are reduce-scattered.
            gate_up_eDG = gather_over(gate_up_eDG, axes, 1, policy.grad_dtype)
            down_eFD = gather_over(down_eFD, axes, 2, policy.grad_dtype)
        y_ND, dropped = _run_dispatched(*chosen, (gate_up_eDG, down_eFD), policy.dispatch)
    stats = _router_stats(routing, segment_BT, dropped, cfg, policy is not None)
    if choices is not None:
        counts = jnp.stack(
            count_differences(routing.expert_NK, choices, segment_BT.reshape(-1) > 0)
        )
        differ, known = sum_over(counts, axes_of("batch", "length")) if policy else counts
        stats = stats._replace(differ=differ / jnp.maximum(known, 1.0))
    return y_ND.reshape(x_BTD.shape), stats


def _run_dispatched(
    x_ND, expert_NK, weight_NK, weights, dispatch: Dispatch
) -> tuple[jax.Array, jax.Array]:
    """Run tokens through the experts of all devices; the sums, and the share that was dropped."""
    dropped = jnp.zeros(())
    if dispatch.kind == "allgather" or jax.lax.axis_size("expert") == 1:
        y_ND = dispatch_allgather(x_ND, expert_NK, weight_NK, weights)
    else:
        y_ND, dropped = dispatch_alltoall(x_ND, expert_NK, weight_NK, weights, dispatch)
        dropped = jax.lax.pmean(dropped, axes_of("batch", "length"))
    return sum_over(y_ND, "model"), dropped  # each device has a part of the hidden width


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _run_low_bit(
    x_ND, expert_NK, weight_NK, weights, experts: int, policy: Policy | None
) -> jax.Array:
    """Run one device's share of low-bit experts, which are frozen.

    The backward pass decodes this device's experts of one layer, whole, in the compute dtype.
    """
    hidden = axes_of("expert_ffw") if policy else ()
    stacks = jax.tree.map(lambda a: a[None], _gather_low_bit(weights, policy))

    def run(x_MD, weight_M1, size_E):
        return resident_mlp(x_MD, weight_M1, stacks, 0, size_E, hidden)

    y_ND = dispatch_to_resident(x_ND, expert_NK, weight_NK, experts, run)
    return sum_over(y_ND, hidden) if policy else y_ND


def _gather_low_bit(weights, policy: Policy | None):
    if policy and (axes := storage_spec(("expert_embed",))[0]):
        return tuple(
            gather_low_bit(w, axes, dim) for w, dim in zip(weights, (1, 1, 2), strict=True)
        )
    return weights


def _low_bit_forward(x_ND, expert_NK, weight_NK, weights, experts, policy):
    saved = (x_ND, expert_NK, weight_NK, weights)
    return _run_low_bit(*saved, experts, policy), saved


def _low_bit_backward(experts: int, policy: Policy | None, saved, dy_ND):
    del experts
    x_ND, expert_NK, weight_NK, weights = saved
    hidden = axes_of("expert_ffw") if policy else ()
    layouts = P(None, None, hidden), P(None, None, hidden), P(None, hidden, None)
    plain = fuse_gate_up(
        *(
            decode(w, 1, layout).astype(x_ND.dtype)
            for w, layout in zip(_gather_low_bit(weights, policy), layouts, strict=True)
        )
    )

    def run(x_ND, weight_NK):
        if policy is None:
            return expert_mlp(x_ND, expert_NK, weight_NK, plain)
        kind = policy.dispatch.kind.removesuffix("_capacity")  # the forward pass drops nothing
        dispatch = policy.dispatch._replace(kind=kind)
        return _run_dispatched(x_ND, expert_NK, weight_NK, plain, dispatch)[0]

    dx_ND, dweight_NK = jax.vjp(run, x_ND, weight_NK)[1](dy_ND)
    return dx_ND, None, dweight_NK, None


_run_low_bit.defvjp(_low_bit_forward, _low_bit_backward)


def _router_stats(
    routing: Routing, segment_BT: jax.Array, dropped: jax.Array, cfg: ModelConfig, mesh: bool
) -> RouterStats:
    """Compute the load over the whole batch, and the sequence-wise loss [DSV3-TR 2.1.2].

    For each row: sum over experts of f P, f the expert's share of choices times experts, P its
    mean normalised score. 1 when perfectly even; the mean over rows is returned.
    """
    valid_BT = segment_BT > 0

    def total(a: jax.Array, *logical: str) -> jax.Array:
        return sum_over(a, axes_of(*logical)) if mesh else a

    def by_row(a: jax.Array) -> jax.Array:
        return a.reshape(*segment_BT.shape, -1)

    load_E = count_choices(routing.expert_NK, valid_BT.reshape(-1), cfg.experts)

    hit_BTE = (by_row(routing.expert_NK)[..., None] == jnp.arange(cfg.experts)).any(axis=2)
    share_BTE = by_row(routing.score_NE / routing.score_NE.sum(axis=-1, keepdims=True))
    keep = valid_BT[..., None]
    length_B1 = total(valid_BT.sum(axis=1, keepdims=True, dtype=jnp.float32), "length")
    f_BE = total((hit_BTE & keep).sum(axis=1, dtype=jnp.float32), "length")
    p_BE = total(jnp.where(keep, share_BTE, 0.0).sum(axis=1), "length")
    scale_B1 = cfg.experts / cfg.experts_per_token / jnp.maximum(length_B1, 1.0) ** 2
    aux_B = (jax.lax.stop_gradient(f_BE) * p_BE * scale_B1).sum(axis=1)
    some_B = (length_B1[:, 0] > 0).astype(jnp.float32)
    aux = total((aux_B * some_B).sum(), "batch") / jnp.maximum(total(some_B.sum(), "batch"), 1.0)
    return RouterStats(total(load_E, "batch", "length"), aux, dropped)
