"""One token at a time, with absorbed attention over a cache of latents.

A token leaves `kv_rank + rope` numbers a layer for later ones, not a key and a value a head. The
key and value projections are applied to the query and to the mixed latent instead, so scores and
values are never made for single heads [DSV3 model.py, "absorb"; spec 1.4].

Prompts of unequal length begin together at slot 0 and are padded behind; what is generated goes
to the same slots in all rows, after the longest prompt. Slots and positions are therefore
different things: a row's next position is how many tokens it has.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.model.attention import attend, latents, queries
from k2jax.model.kimi import embedded
from k2jax.model.logits import head
from k2jax.model.mlp import gated
from k2jax.model.moe import mixture, moe_small_batch
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, gather_weight, project
from k2jax.model.rope import Rotation, rotation
from k2jax.params.kimi import Attention, Kimi, Layer
from k2jax.sharding import reshard, spec

# Stacks up to this deep are taken apart before the loop over tokens, experts excepted; XLA would
# otherwise copy each layer's weights out of the stack at every token. Deeper ones would compile
# too long, and what is taken apart is kept twice.
TAKEN_APART = 16

Stack = Layer | tuple[Layer, ...]


class Cache(NamedTuple):
    """What the tokens so far left for later ones; S counts slots, not positions."""

    # For each stack latent_LBSM, or latent_BSM of each of its layers; compute dtype. The normed
    # latent, then the rotated shared key.
    latents: tuple[jax.Array | tuple[jax.Array, ...], ...]
    seen_BS: jax.Array  # bool, slots with a token
    position_B: jax.Array  # int32, of the next token
    slot: jax.Array  # int32 scalar, where the next token goes


def stacks(w: Kimi, cfg: ModelConfig) -> tuple[Stack, ...]:
    """The layers as `step` goes through them: a stack whole, or its layers one by one."""
    return tuple(_apart(stack, depth) for stack, depth in _whole(w, cfg))


def _whole(w: Kimi, cfg: ModelConfig) -> list[tuple[Layer, int]]:
    dense = [(w.dense, cfg.dense_layers)] if cfg.dense_layers else []
    return [*dense, (w.layers, cfg.moe_layers)]


def _apart(stack: Any, depth: int) -> Any:
    if depth > TAKEN_APART:
        return stack
    return tuple(jax.tree.map(operator.itemgetter(i), stack) for i in range(depth))


def prefill(
    w: Kimi, token_BT: jax.Array, length_B: jax.Array, cfg: ModelConfig, slots: int, policy: Policy
) -> tuple[jax.Array, Cache]:
    """Logits after each prompt, float32 [batch, vocab], and the cache it leaves.

    Args:
        w: weights.
        token_BT: prompts, each from the start of its row; what lies behind is never looked at.
        length_B: int32 tokens of each prompt, 1..length.
        cfg: sizes.
        slots: tokens the cache has room for, the row's length included.
        policy: dtypes, and how weights are read.
    """
    length = token_BT.shape[1]
    order_BT = reshard(jnp.broadcast_to(jnp.arange(length), token_BT.shape), "batch", "length")
    segment_BT = (order_BT < length_B[:, None]).astype(jnp.int32)
    turn = rotation(order_BT, cfg)

    def layer(x_BTD: jax.Array, w: Layer):
        u_BTD = rms_norm(x_BTD, w.attention_norm, cfg.norm_eps, policy)
        left_BTM = jnp.concatenate(latents(w.attention, u_BTD, turn, cfg, policy), axis=-1)
        x_BTD += attend(w.attention, u_BTD, turn, segment_BT, cfg, policy)[0]
        u_BTD = rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps, policy)
        if hasattr(w, "moe"):
            x_BTD += mixture(w.moe, u_BTD, segment_BT, cfg, policy)[0]
        else:
            x_BTD += gated(w.mlp, u_BTD, policy)
        return x_BTD, left_BTM

    x_BTD, left = embedded(w, token_BT, policy), []
    room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    for stack, depth in _whole(w, cfg):
        x_BTD, left_LBTM = jax.lax.scan(layer, x_BTD, stack)
        left_LBSM = reshard(jnp.pad(left_LBTM, room), None, "batch", None, None)
        left.append(_apart(left_LBSM, depth))
    cache = Cache(
        tuple(left),
        reshard(jnp.arange(slots) < length_B[:, None], "batch", None),
        length_B,
        jnp.int32(length),
    )
    last_BT = order_BT == length_B[:, None] - 1
    x_BTD = jnp.where(last_BT[..., None], x_BTD, 0).sum(axis=1, keepdims=True)
    return _logits(w, x_BTD, cfg, policy), cache


def step(
    w: Kimi, layers: tuple[Stack, ...], cache: Cache, token_B: jax.Array, cfg: ModelConfig,
    policy: Policy,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Logits after one more token in every row, float32 [batch, vocab], and the longer cache.

    The caller sees to it that the cache has a free slot.

    Args:
        w: weights.
        layers: `stacks` of them, made once for all steps.
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
        left_BTM = jnp.concatenate(latents(w.attention, u_BTD, turn, cfg, policy), axis=-1)
        left_BTM = reshard(left_BTM, "batch", None, None)
        latent_BSM = jax.lax.dynamic_update_slice(latent_BSM, left_BTM, (0, cache.slot, 0))
        x_BTD += absorbed(w.attention, u_BTD, turn, latent_BSM, seen_BS, cfg, policy)
        u_BTD = rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps, policy)
        if hasattr(w, "moe"):
            x_BTD += moe_small_batch(w.moe, experts, jnp.asarray(index), u_BTD, cfg, policy)
        else:
            x_BTD += gated(w.mlp, u_BTD, policy)
        return x_BTD, latent_BSM

    x_BTD, left = embedded(w, token_B[:, None], policy), []
    for stack, old in zip(layers, cache.latents, strict=True):
        if isinstance(stack, tuple):
            new = []
            for at in zip(range(len(stack)), stack, old, strict=True):
                x_BTD, latent_BSM = layer(x_BTD, at)
                new.append(latent_BSM)
            left.append(tuple(new))
        else:
            x_BTD, latent_LBSM = jax.lax.scan(
                layer,
                x_BTD,
                (jnp.arange(len(old)), stack, old),  # type: ignore[arg-type]
            )
            left.append(latent_LBSM)
    cache = Cache(tuple(left), seen_BS, cache.position_B + 1, cache.slot + 1)
    return _logits(w, x_BTD, cfg, policy), cache


def absorbed(
    w: Attention, x_BTD: jax.Array, turn: Rotation, latent_BSM: jax.Array, seen_BS: jax.Array,
    cfg: ModelConfig, policy: Policy,
) -> jax.Array:  # fmt: skip
    """Attention output of tokens that see every slot in `seen_BS`, from latents alone."""
    heads = spec("batch", "heads", "length", None)
    q_BHTU, q_BHTP = queries(w, x_BTD, turn, cfg, policy)
    up_RHW = gather_weight(w.kv_up, policy)
    q_BHTR = jnp.einsum("bhtu,rhu->bhtr", q_BHTU, up_RHW[..., : cfg.nope], out_sharding=heads)
    q_BHTM = jnp.concatenate([q_BHTR, q_BHTP], axis=-1)
    # The cache first: its rows are then read as they lie, by a CPU too.
    logit_BHTS = jnp.einsum(
        "bsm,bhtm->bsht", latent_BSM, q_BHTM, preferred_element_type=jnp.float32
    ).transpose(0, 2, 3, 1)
    logit_BHTS = jnp.where(seen_BS[:, None, None], logit_BHTS * cfg.softmax_scale, -jnp.inf)
    weight_BHTS = jnp.exp(logit_BHTS - logit_BHTS.max(axis=-1, keepdims=True))
    mixed_BHTM = jnp.einsum(
        "bhts,bsm->bhtm", weight_BHTS.astype(x_BTD.dtype), latent_BSM,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    sum_BHT1 = weight_BHTS.sum(axis=-1, keepdims=True)
    mixed_BHTR = (mixed_BHTM[..., : cfg.kv_rank] / sum_BHT1).astype(x_BTD.dtype)
    y_BHTV = jnp.einsum("bhtr,rhv->bhtv", mixed_BHTR, up_RHW[..., cfg.nope :], out_sharding=heads)
    return project("bhtv,hvd->btd", y_BHTV, w.out, ("batch", "length", None), policy)


def _logits(w: Kimi, x_BTD: jax.Array, cfg: ModelConfig, policy: Policy) -> jax.Array:
    return head(w.head, rms_norm(x_BTD, w.norm, cfg.norm_eps, policy), policy)[:, 0]
