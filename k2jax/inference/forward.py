"""The network over chunks of sequences whose earlier tokens lie in pages of latents.

A chunk is some consecutive tokens of one sequence: one new token where it decodes, a block of the
prompt where it is read. In each layer the latents of all chunks are written to their pages first;
then every token attends to its sequence's pages, so that chunks of one sequence may be in the same
call, in any number.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.inference.cache import Pool
from k2jax.inference.paged_attention import Chunks, absorb_queries, attend_pages, project_values
from k2jax.model.attention import project_latents
from k2jax.model.logits import head, pick_tokens
from k2jax.model.mlp import gated_mlp
from k2jax.model.moe import moe_for_inference
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, look_up
from k2jax.model.rope import rotation
from k2jax.params.arrays import Params, bind
from k2jax.params.kimi import Kimi
from k2jax.sharding import reshard

# Stacks of at most this many layers are split into layers before anything is computed, experts
# excepted; XLA would otherwise copy each layer's weights out of the stack in every call. Deeper
# stacks would compile too long, and layers that are split off are in memory twice.
MAX_UNSTACKED_LAYERS = 16
EXPERTS, MOE = "moe.experts.", "moe.router"


class Weights(NamedTuple):
    """Arrays of the network by the names of their declarations."""

    whole: Params  # neither embedding, head nor experts belong to one layer
    # For each stack its arrays, or those of each of its layers, without the stack's name.
    stacks: tuple[Params | tuple[Params, ...], ...]


def split_weights(params: Params, cfg: ModelConfig) -> Weights:
    """Take the stacks apart that are not too deep; experts stay in theirs."""
    whole, stacks = dict(params), []
    for prefix, depth in _list_stacks(cfg):
        names = [name for name in params if name.startswith(prefix) and EXPERTS not in name]
        stack = {name.removeprefix(prefix): whole.pop(name) for name in names}
        stacks.append(
            stack
            if depth > MAX_UNSTACKED_LAYERS
            else tuple(jax.tree.map(operator.itemgetter(i), stack) for i in range(depth))
        )
    return Weights(whole, tuple(stacks))


def list_depths(cfg: ModelConfig) -> list[int]:
    """Layers of each stack, negative where it is taken apart: `cache.make_pool` takes it."""
    depths = [depth for _, depth in _list_stacks(cfg)]
    return [depth if depth > MAX_UNSTACKED_LAYERS else -depth for depth in depths]


def _list_stacks(cfg: ModelConfig) -> list[tuple[str, int]]:
    """Prefix of the names and depth of each stack."""
    dense = [("dense.", cfg.dense_layers)] if cfg.dense_layers else []
    return [*dense, ("layers.", cfg.moe_layers)]


def forward(
    weights: Weights,
    pool: Pool,
    chunks: Chunks,
    cfg: ModelConfig,
    policy: Policy,
    head_rows: int = 0,
) -> tuple[jax.Array, Pool]:
    """Read the chunks: float32 logits of the wanted tokens, and the pool with their latents.

    Args:
        weights: from `split_weights`.
        pool: latents of earlier tokens.
        chunks: what to read.
        cfg: sizes.
        policy: dtypes, and how weights are read.
        head_rows: most tokens whose logits are computed at a time; 0: all.
    """
    declared = Kimi(cfg)
    order_T = jnp.arange(chunks.token_BT.shape[1])
    valid_BT = order_T < chunks.count_B[:, None]
    turn = rotation(reshard(chunks.start_B[:, None] + order_T, "batch", "length"), cfg)
    valid_BT = reshard(valid_BT, "batch", "length")

    def apply_layer(
        x_BTD: jax.Array, params: Params, latents: jax.Array, index: jax.Array, stacked: bool
    ) -> tuple[jax.Array, jax.Array]:
        at = index if stacked else None
        w = bind(declared.layers if MOE in params else declared.dense, params)
        u_BTD = rms_norm(x_BTD, w.attention_norm, cfg.norm_eps, policy)
        new_BTM = jnp.concatenate(project_latents(w.attention, u_BTD, turn, cfg, policy), axis=-1)
        q_BHTM, up_RHW = absorb_queries(w.attention, u_BTD, turn, cfg, policy)
        mixed_BHTR, latents = attend_pages(q_BHTM, new_BTM, latents, at, chunks, cfg)
        x_BTD += project_values(w.attention, mixed_BHTR, up_RHW, cfg, policy)
        u_BTD = rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps, policy)
        if hasattr(w, "moe"):
            y_BTD = moe_for_inference(w.moe, index, u_BTD, valid_BT, cfg, policy)
        else:
            y_BTD = gated_mlp(w.mlp, u_BTD, policy)
        return x_BTD + y_BTD, latents

    # Traced once for all layers of a kind that were taken apart.
    apply_one = jax.jit(functools.partial(apply_layer, stacked=False))
    w = bind(Ends(declared), weights.whole)
    x_BTD, written = look_up(w.embed, chunks.token_BT, policy), []
    for (prefix, _), stack, old in zip(_list_stacks(cfg), weights.stacks, pool, strict=True):
        experts = {
            name.removeprefix(prefix): a
            for name, a in weights.whole.items()
            if name.startswith(prefix + EXPERTS)
        }
        if isinstance(stack, tuple):
            new = []
            for i, (params, latents) in enumerate(zip(stack, old, strict=True)):
                x_BTD, after = apply_one(x_BTD, params | experts, latents, jnp.int32(i))
                new.append(after)
            written.append(tuple(new))
        else:

            def apply_next(carry, at, experts=experts):
                index, params = at
                return apply_layer(carry[0], params | experts, carry[1], index, True), None

            assert not isinstance(old, tuple)
            depth = jnp.arange(old.shape[0])
            (x_BTD, latents), _ = jax.lax.scan(apply_next, (x_BTD, old), (depth, stack))
            written.append(latents)
    return _read_head(w, pick_tokens(x_BTD, chunks.wanted_N), cfg, policy, head_rows), tuple(
        written
    )


def _read_head(
    w: "Ends", x_N1D: jax.Array, cfg: ModelConfig, policy: Policy, rows: int
) -> jax.Array:
    """Compute the logits of tokens, at least these, at most `rows` at a time; 0: all at once."""

    def read(x_N1D: jax.Array) -> jax.Array:
        return head(w.head, rms_norm(x_N1D, w.norm, cfg.norm_eps, policy), policy)[:, 0]

    if not rows or len(x_N1D) <= rows:
        return read(x_N1D)
    parts = -(-len(x_N1D) // rows)
    x_N1D = jnp.pad(x_N1D, ((0, parts * rows - len(x_N1D)), (0, 0), (0, 0)))
    return jax.lax.map(read, x_N1D.reshape(parts, rows, 1, -1)).reshape(parts * rows, -1)


class Ends:
    """What comes before and after the layers."""

    def __init__(self, declared: Kimi):
        self.embed, self.norm, self.head = declared.embed, declared.norm, declared.head
