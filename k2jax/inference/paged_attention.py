"""Attention of chunks to the pages of their sequences, from latents alone.

It is absorbed: the key and value projections are applied to the query and to the mixed latent, and
keys and values of single heads are never computed [DSV3 model.py, "absorb"]. It goes through the
pages by blocks of `KEY_BLOCK` keys, as many as the longest sequence has, with an online softmax. A
block in which a token sees nothing leaves its numbers as they are, bit for bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.inference.cache import pool_spec, read_pages, write_latents
from k2jax.model.attention import project_queries
from k2jax.model.projection import Policy, gather_weight, project
from k2jax.model.rope import Rotation
from k2jax.ops.collectives import all_to_all
from k2jax.params.kimi import Attention
from k2jax.sharding import meshless, reshard, spec, storage_spec

KEY_BLOCK = 128  # keys that queries meet at a time
NEG_INF = -1e30  # below every logit; finite, so that differences are
HEADS = ("batch", "heads", "length", None)

Int = Any  # int32, of NumPy until it is computed with


class Chunks(NamedTuple):
    """Chunks of one call, padded to a fixed number of chunks and of tokens; all int32."""

    token_BT: Int
    start_B: Int  # position of the first token
    count_B: Int  # tokens; 0: the chunk is padding
    table: Int  # [chunks, n], pages of the sequence in order; padded with 0
    wanted_N: Int  # tokens of which logits are wanted: chunk * T + token


def absorb_queries(
    w: Attention, x_BTD: jax.Array, turn: Rotation, cfg: ModelConfig, policy: Policy
) -> tuple[jax.Array, jax.Array]:
    """Project to queries that meet latents, `q_BHTM`; also the up-projection `up_RHW`."""
    q_BHTU, q_BHTP = project_queries(w, x_BTD, turn, cfg, policy)
    up_RHW = gather_weight(w.kv_up, policy)
    key_RHU = up_RHW[..., : cfg.nope]
    q_BHTR = jnp.einsum("bhtu,rhu->bhtr", q_BHTU, key_RHU, out_sharding=spec(*HEADS))
    return jnp.concatenate([q_BHTR, q_BHTP], axis=-1), up_RHW


def project_values(
    w: Attention, mixed_BHTR: jax.Array, up_RHW: jax.Array, cfg: ModelConfig, policy: Policy
) -> jax.Array:
    """Project mixed latents to values, and those to the output `y_BTD`."""
    value_RHV = up_RHW[..., cfg.nope :]
    y_BHTV = jnp.einsum("bhtr,rhv->bhtv", mixed_BHTR, value_RHV, out_sharding=spec(*HEADS))
    return project("bhtv,hvd->btd", y_BHTV, w.out, ("batch", "length", None), policy)


def attend_pages(
    q_BHTM: jax.Array,
    new_BTM: jax.Array,
    latents: jax.Array,
    index: jax.Array | None,
    chunks: Chunks,
    cfg: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Write the chunks' latents to their pages, then mix each token's latents by its softmax.

    Args:
        q_BHTM: absorbed queries.
        new_BTM: latents of the same tokens.
        latents: the pool's [pages, page, latent] of this layer, or of all layers of a stack.
        index: of the layer in the stack.
        chunks: where the tokens lie.
        cfg: sizes.

    Returns:
        `mixed_BHTR`, and the pool with the new latents.

    On a mesh, devices with a part of the heads exchange it for a part of the chunks, those whose
    pages they have, and exchange back what was mixed.
    """
    table = reshard(chunks.table, "cache", None)
    places = (table, reshard(chunks.start_B, "cache"), reshard(chunks.count_B, "cache"))
    if meshless():
        latents = write_latents(latents, new_BTM, *places, index)
        return _mix_latents(q_BHTM, latents, index, *places, cfg), latents

    def on_device(q_BHTM, new_BTM, latents, index, table, start_B, count_B):
        latents = write_latents(latents, new_BTM, table, start_B, count_B, index)
        q_BHTM = all_to_all(q_BHTM, "model", 0, 1)
        mixed_BHTR = _mix_latents(q_BHTM, latents, index, table, start_B, count_B, cfg)
        return all_to_all(mixed_BHTR, "model", 1, 0), latents

    heads, rows = storage_spec(HEADS), storage_spec(("cache",))
    pool = pool_spec(index is not None)
    return jax.shard_map(
        on_device,
        in_specs=(heads, rows, pool, jax.P(), rows, rows, rows),
        out_specs=(heads, pool),
        check_vma=False,  # loops whose length differs between devices
    )(q_BHTM, reshard(new_BTM, "cache", None, None), latents, index, *places)


def _mix_latents(
    q_BHTM: jax.Array,
    latents: jax.Array,
    index: jax.Array | None,
    table: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    cfg: ModelConfig,
) -> jax.Array:
    """Mix the latents that each token of one device sees: `mixed_BHTR`."""
    page, rank, dtype = latents.shape[-2], cfg.kv_rank, q_BHTM.dtype
    pages = max(KEY_BLOCK // page, 1)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
    position_BT = start_B[:, None] + jnp.arange(q_BHTM.shape[2])
    end_B = start_B + count_B

    def add_block(state):
        i, top_BHT, sum_BHT, mixed_BHTR = state
        block = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        place_S = i * pages * page + jnp.arange(pages * page)
        # What was never written is selected away: it may be anything, and 0 x NaN is NaN.
        written_BS1 = (place_S < end_B[:, None])[..., None]
        latent_BSM = jnp.where(written_BS1, read_pages(latents, block, index), 0)
        logit_BHTS = jnp.einsum(
            "bhtm,bsm->bhts", q_BHTM, latent_BSM, preferred_element_type=jnp.float32
        )
        seen_BTS = place_S <= position_BT[..., None]
        logit_BHTS = jnp.where(seen_BTS[:, None], logit_BHTS * cfg.softmax_scale, NEG_INF)
        old_BHT, top_BHT = top_BHT, jnp.maximum(top_BHT, logit_BHTS.max(axis=-1))
        weight_BHTS = jnp.exp(logit_BHTS - top_BHT[..., None])
        factor_BHT = jnp.exp(old_BHT - top_BHT)
        more_BHTR = jnp.einsum(
            "bhts,bsr->bhtr",
            weight_BHTS.astype(dtype),
            latent_BSM[..., :rank],
            preferred_element_type=jnp.float32,
        )
        sum_BHT = sum_BHT * factor_BHT + weight_BHTS.sum(axis=-1)
        return i + 1, top_BHT, sum_BHT, mixed_BHTR * factor_BHT[..., None] + more_BHTR

    shape = q_BHTM.shape[:3]
    start = (
        jnp.int32(0),
        jnp.full(shape, NEG_INF, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, rank), jnp.float32),
    )
    last = (end_B.max() - 1) // (pages * page)
    _, _, sum_BHT, mixed_BHTR = jax.lax.while_loop(lambda s: s[0] <= last, add_block, start)
    return (mixed_BHTR / sum_BHT[..., None]).astype(dtype)
