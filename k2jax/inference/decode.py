"""One token at a time, with absorbed attention over a cache of latents.

The cache has `kv_rank + rope` numbers per token and layer, not a key and a value per head. The key
and value projections are applied to the query and to the mixed latent instead, so keys and values
of single heads are never computed [DSV3 model.py, "absorb"].

Prompts of unequal length begin together at slot 0 and are padded at the end; generated tokens go to
the same slots in all rows, after the longest prompt. Slots and positions therefore differ: a row's
next position is the number of its tokens.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.model.attention import attend, project_latents, project_queries
from k2jax.model.kimi import embed_tokens
from k2jax.model.logits import head
from k2jax.model.mlp import gated_mlp
from k2jax.model.moe import moe_forward, moe_small_batch
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, gather_weight, project
from k2jax.model.rope import Rotation, rotation
from k2jax.params.kimi import Attention, Kimi, Layer
from k2jax.sharding import reshard, spec

# Stacks of at most this many layers are split into layers before the loop over tokens, experts
# excepted; XLA would otherwise copy each layer's weights out of the stack at every token. Deeper
# stacks would compile too long, and layers that are split off are in memory twice.
MAX_UNSTACKED_LAYERS = 16

Stack = Layer | tuple[Layer, ...]


class Cache(NamedTuple):
    """Latents of the tokens so far; S counts slots, not positions."""

    # For each stack latent_LBSM, or latent_BSM of each of its layers; compute dtype. The normed
    # latent, then the rotated shared key.
    latents: tuple[jax.Array | tuple[jax.Array, ...], ...]
    seen_BS: jax.Array  # bool, slots with a token
    position_B: jax.Array  # int32, of the next token
    slot: jax.Array  # int32 scalar, where the next token goes


def unstack_layers(w: Kimi, cfg: ModelConfig) -> tuple[Stack, ...]:
    """Take the stacks apart that are not too deep: `step` goes through these layers."""
    return tuple(_unstack(stack, depth) for stack, depth in _list_stacks(w, cfg))


def _list_stacks(w: Kimi, cfg: ModelConfig) -> list[tuple[Layer, int]]:
    dense = [(w.dense, cfg.dense_layers)] if cfg.dense_layers else []
    return [*dense, (w.layers, cfg.moe_layers)]


def _unstack(stack: Any, depth: int) -> Any:
    if depth > MAX_UNSTACKED_LAYERS:
        return stack
    return tuple(jax.tree.map(operator.itemgetter(i), stack) for i in range(depth))


def prefill(
    w: Kimi, token_BT: jax.Array, length_B: jax.Array, cfg: ModelConfig, slots: int, policy: Policy
) -> tuple[jax.Array, Cache]:
    """Read the prompts: logits after each, float32 [batch, vocab], and the cache.

    Args:
        w: weights.
        token_BT: prompts, each from the start of its row; what follows is not read.
        length_B: int32 tokens of each prompt, 1..length.
        cfg: sizes.
        slots: length of the cache in tokens, the row's included.
        policy: dtypes, and how weights are read.
    """
    length = token_BT.shape[1]
    order_BT = reshard(jnp.broadcast_to(jnp.arange(length), token_BT.shape), "batch", "length")
    segment_BT = (order_BT < length_B[:, None]).astype(jnp.int32)
    turn = rotation(order_BT, cfg)

    def layer(x_BTD: jax.Array, w: Layer):
        u_BTD = rms_norm(x_BTD, w.attention_norm, cfg.norm_eps, policy)
        new_BTM = jnp.concatenate(project_latents(w.attention, u_BTD, turn, cfg, policy), axis=-1)
        x_BTD += attend(w.attention, u_BTD, turn, segment_BT, cfg, policy)[0]
        u_BTD = rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps, policy)
        if hasattr(w, "moe"):
            x_BTD += moe_forward(w.moe, u_BTD, segment_BT, cfg, policy)[0]
        else:
            x_BTD += gated_mlp(w.mlp, u_BTD, policy)
        return x_BTD, new_BTM

    x_BTD, cached = embed_tokens(w, token_BT, policy), []
    padding = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    for stack, depth in _list_stacks(w, cfg):
        x_BTD, new_LBTM = jax.lax.scan(layer, x_BTD, stack)
        new_LBSM = reshard(jnp.pad(new_LBTM, padding), None, "cache", None, None)
        cached.append(_unstack(new_LBSM, depth))
    cache = Cache(
        tuple(cached),
        reshard(jnp.arange(slots) < length_B[:, None], "cache", None),
        length_B,
        jnp.int32(length),
    )
    last_BT = order_BT == length_B[:, None] - 1
    x_BTD = jnp.where(last_BT[..., None], x_BTD, 0).sum(axis=1, keepdims=True)
    return _logits(w, x_BTD, cfg, policy), cache


def step(
    w: Kimi,
    layers: tuple[Stack, ...],
    cache: Cache,
    token_B: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
) -> tuple[jax.Array, Cache]:
    """Read one more token in every row: logits, float32 [batch, vocab], and the longer cache.

    The cache must have a free slot.

    Args:
        w: weights.
        layers: from `unstack_layers`, once for all steps.
        cache: from `prefill` or the last step.
        token_B: int32, one a row.
        cfg: sizes.
        policy: dtypes, and how weights are read.
    """
    seen_BS = cache.seen_BS | (jnp.arange(cache.seen_BS.shape[1]) == cache.slot)
    turn = rotation(cache.position_B[:, None], cfg)
    experts = w.layers.moe.experts

    def layer(x_BTD: jax.Array, at: Any):
        index, w, latent_BSM = at
        u_BTD = rms_norm(x_BTD, w.attention_norm, cfg.norm_eps, policy)
        new_BTM = jnp.concatenate(project_latents(w.attention, u_BTD, turn, cfg, policy), axis=-1)
        new_BTM = reshard(new_BTM, "cache", None, None)
        latent_BSM = jax.lax.dynamic_update_slice(latent_BSM, new_BTM, (0, cache.slot, 0))
        x_BTD += absorbed_attention(w.attention, u_BTD, turn, latent_BSM, seen_BS, cfg, policy)
        u_BTD = rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps, policy)
        if hasattr(w, "moe"):
            x_BTD += moe_small_batch(w.moe, experts, jnp.asarray(index), u_BTD, cfg, policy)
        else:
            x_BTD += gated_mlp(w.mlp, u_BTD, policy)
        return x_BTD, latent_BSM

    x_BTD, cached = embed_tokens(w, token_B[:, None], policy), []
    for stack, old in zip(layers, cache.latents, strict=True):
        if isinstance(stack, tuple):
            new = []
            for at in zip(range(len(stack)), stack, old, strict=True):
                x_BTD, latent_BSM = layer(x_BTD, at)
                new.append(latent_BSM)
            cached.append(tuple(new))
        else:
            x_BTD, latent_LBSM = jax.lax.scan(
                layer,
                x_BTD,
                (jnp.arange(len(old)), stack, old),  # type: ignore[arg-type]
            )
            cached.append(latent_LBSM)
    cache = Cache(tuple(cached), seen_BS, cache.position_B + 1, cache.slot + 1)
    return _logits(w, x_BTD, cfg, policy), cache


def absorbed_attention(
    w: Attention,
    x_BTD: jax.Array,
    turn: Rotation,
    latent_BSM: jax.Array,
    seen_BS: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
) -> jax.Array:
    """Compute attention of tokens that see every slot in `seen_BS`, from latents alone.

    Devices with a part of the heads exchange it for a part of the rows, those whose latents they
    have, and exchange back what was mixed.
    """
    heads = spec("batch", "heads", "length", None)
    q_BHTU, q_BHTP = project_queries(w, x_BTD, turn, cfg, policy)
    up_RHW = gather_weight(w.kv_up, policy)
    q_BHTR = jnp.einsum("bhtu,rhu->bhtr", q_BHTU, up_RHW[..., : cfg.nope], out_sharding=heads)
    q_BHTM = reshard(jnp.concatenate([q_BHTR, q_BHTP], axis=-1), "cache", None, None, None)
    # The cache is the first factor: a CPU then reads its rows in order of memory.
    logit_BHTS = jnp.einsum(
        "bsm,bhtm->bsht", latent_BSM, q_BHTM, preferred_element_type=jnp.float32
    ).transpose(0, 2, 3, 1)
    logit_BHTS = jnp.where(seen_BS[:, None, None], logit_BHTS * cfg.softmax_scale, -jnp.inf)
    weight_BHTS = jnp.exp(logit_BHTS - logit_BHTS.max(axis=-1, keepdims=True))
    mixed_BHTM = jnp.einsum(
        "bhts,bsm->bhtm",
        weight_BHTS.astype(x_BTD.dtype),
        latent_BSM,
        preferred_element_type=jnp.float32,
    )
    sum_BHT1 = weight_BHTS.sum(axis=-1, keepdims=True)
    mixed_BHTR = (mixed_BHTM[..., : cfg.kv_rank] / sum_BHT1).astype(x_BTD.dtype)
    mixed_BHTR = reshard(mixed_BHTR, "batch", "heads", None, None)
    y_BHTV = jnp.einsum("bhtr,rhv->bhtv", mixed_BHTR, up_RHW[..., cfg.nope :], out_sharding=heads)
    return project("bhtv,hvd->btd", y_BHTV, w.out, ("batch", "length", None), policy)


def _logits(w: Kimi, x_BTD: jax.Array, cfg: ModelConfig, policy: Policy) -> jax.Array:
    return head(w.head, rms_norm(x_BTD, w.norm, cfg.norm_eps, policy), policy)[:, 0]
