"""Drafts: the first MTP layer guesses the token after the next one.

At a place of a sequence the layer reads the token there and the main network's normed output of the
place before, and guesses the token that follows [DSV3-TR 2.2]. Its latents lie in the same pages as
those of the other layers, and so do those outputs: whatever shares a page, or computes it again,
has them. The main network's programs write both for the tokens that they read; the layer itself
runs for each sequence's newest token alone. Nothing goes before the first token: its place is not
attended to. Guesses are checked, so what lies here decides how many steps are saved, never a token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.inference.cache import pool_spec, write_latents
from k2jax.inference.layer import Reading, apply_layer, latents_of
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, look_up, project
from k2jax.params.arrays import Params, bind
from k2jax.params.kimi import Kimi
from k2jax.sharding import meshless, reshard, storage_spec

PREFIX, EXPERTS = "mtp.", "mtp.moe.experts."

# Normed outputs and latents, [pages, page, ...] each: the last entry of a `Pool`.
DraftPool = Any


def bind_first(params: Params, cfg: ModelConfig) -> Any:
    """Bind the first MTP layer, but for its experts, which are those of all MTP layers."""
    names = [name for name in params if name.startswith(PREFIX)]
    return bind(
        Kimi(cfg).mtp,
        {
            name.removeprefix(PREFIX): params[name]
            if name.startswith(EXPERTS)
            else jax.tree.map(lambda a: a[0], params[name])
            for name in names
        },
    )


def note_outputs(
    w: Any, mtp: Any, x_BTD: jax.Array, pool: DraftPool, reading: Reading, cfg, policy: Policy
) -> DraftPool:
    """Write what later drafts need of the tokens that the main network has read.

    Args:
        w: has the main network's embedding.
        mtp: from `bind_first`.
        x_BTD: normed outputs of the main network.
        pool: of earlier tokens.
        reading: the chunks.
        cfg: sizes.
        policy: dtypes, and how weights are read.
    """
    outputs = _write(pool[0], x_BTD, reading)
    u_BTD = rms_norm(
        _join(w, mtp, outputs, reading, cfg, policy), mtp.attention_norm, cfg.norm_eps, policy
    )
    return outputs, _write(pool[1], latents_of(mtp, u_BTD, reading, cfg, policy), reading)


def apply_first(
    w: Any, mtp: Any, pool: DraftPool, reading: Reading, cfg: ModelConfig, policy: Policy
) -> tuple[jax.Array, DraftPool]:
    """Apply the layer to tokens that the main network has not read yet: `x_BTD`, before its norm.

    Args:
        w: has the main network's embedding.
        mtp: from `bind_first`.
        pool: of earlier tokens.
        reading: the chunks.
        cfg: sizes.
        policy: dtypes, and how weights are read.
    """
    outputs, latents = pool
    x_BTD = _join(w, mtp, outputs, reading, cfg, policy)
    index, reading = (jnp.int32(0), False), reading._replace(first=1)
    x_BTD, latents, _ = apply_layer(mtp, index, x_BTD, latents, reading, cfg, policy)
    return x_BTD, (outputs, latents)


def _join(w: Any, mtp: Any, outputs: jax.Array, reading: Reading, cfg, policy: Policy):
    """Join each token's embedding with the output of the place before."""
    e_BTD = look_up(w.embed, reading.chunks.token_BT, policy)
    e_BTD = rms_norm(e_BTD, mtp.embed_norm, cfg.norm_eps, policy)
    x_BTD = _read_before(outputs, reading).astype(e_BTD.dtype)
    x_BTD = rms_norm(x_BTD, mtp.hidden_norm, cfg.norm_eps, policy)
    both_BTJ = jnp.concatenate([e_BTD, x_BTD], axis=-1)
    return project("btj,jd->btd", both_BTJ, mtp.join, ("batch", "length", None), policy)


def _write(pages: jax.Array, new_BTX: jax.Array, reading: Reading) -> jax.Array:
    chunks = reading.chunks
    places = chunks.table, chunks.start_B, chunks.count_B
    if meshless():
        return write_latents(pages, new_BTX, *places)
    rows, pool = storage_spec(("cache",)), pool_spec(stacked=False)
    write = jax.shard_map(write_latents, in_specs=(pool, *[rows] * 4), out_specs=pool)
    at = [reshard(a, "cache", *[None] * (a.ndim - 1)) for a in (new_BTX, *map(jnp.asarray, places))]
    return write(pages, *at)


def _read_before(pages: jax.Array, reading: Reading) -> jax.Array:
    """Read what was written at the place before each token; anything for a first token."""
    chunks, page = reading.chunks, pages.shape[-2]

    def read(pages: jax.Array, table: jax.Array, start_B: jax.Array) -> jax.Array:
        order_T = jnp.arange(chunks.token_BT.shape[1])
        place_BT = jnp.maximum(start_B[:, None] + order_T - 1, 0)
        page_BT = jnp.take_along_axis(table, place_BT // page, axis=1, mode="clip")
        return pages.at[page_BT, place_BT % page].get(mode="promise_in_bounds")

    if meshless():
        return read(pages, chunks.table, chunks.start_B)
    rows, pool = storage_spec(("cache",)), pool_spec(stacked=False)
    places = reshard(chunks.table, "cache", None), reshard(chunks.start_B, "cache")
    x_BTD = jax.shard_map(read, in_specs=(pool, rows, rows), out_specs=rows)(pages, *places)
    return reshard(x_BTD, "batch", "length", None)
