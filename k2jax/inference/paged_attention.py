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
from k2jax.model.attention import compress_queries
from k2jax.model.projection import Policy, gather_weight, project
from k2jax.model.rope import Rotation, rotate
from k2jax.ops.collectives import all_to_all
from k2jax.params.kimi import Attention
from k2jax.sharding import is_for_cpu, meshless, reshard, spec, storage_spec

KEY_BLOCK = 64  # keys that queries meet at a time
CHUNKS_AT_ONCE = 4  # chunks of several tokens that go through the same blocks of keys
NEG_INF = -1e30  # below every logit; finite, so that differences are
HEADS = ("batch", "heads", "length", None)

Int = Any  # int32, of NumPy until it is computed with
# Of chunks: their tables, the place of their first token, and their number of tokens.
Places = tuple[jax.Array, ...]


class Chunks(NamedTuple):
    """Chunks of one call, padded to a fixed number of chunks and of tokens; all int32."""

    token_BT: Int
    start_B: Int  # position of the first token
    count_B: Int  # tokens; 0: the chunk is padding
    table: Int  # [chunks, n], pages of the sequence in order; padded with 0
    wanted_N: Int  # tokens of which logits are wanted: chunk * T + token; then -1


class HeadUp(NamedTuple):
    """The up-projection of latents by head, as products read it without transposing it."""

    key_HRU: jax.Array
    value_HVR: jax.Array


def lay_out_up(up_RHW: jax.Array, cfg: ModelConfig) -> HeadUp:
    """Lay a layer's up-projection out by head."""
    return HeadUp(
        up_RHW[..., : cfg.nope].transpose(1, 0, 2), up_RHW[..., cfg.nope :].transpose(1, 2, 0)
    )


def absorb_queries(
    w: Attention, x_BTD: jax.Array, turn: Rotation, cfg: ModelConfig, policy: Policy
) -> tuple[jax.Array, HeadUp]:
    """Project to queries that meet latents, `q_BHTM`; also the up-projection.

    Args:
        w: weights of one layer; `kv_up` may be laid out already.
        x_BTD: normed activations.
        turn: rotation of each position.
        cfg: sizes.
        policy: how weights are read.
    """
    up = w.kv_up.get_value()
    if isinstance(up, HeadUp):
        up = HeadUp(*(a.astype(policy.compute_dtype) for a in up))
    else:
        up = lay_out_up(gather_weight(w.kv_up, policy), cfg)
    q_BTI, weight = compress_queries(w, x_BTD, cfg, policy)
    rows = ("batch", "length", "heads", None)
    q_BTHC = project("bti,ihc->bthc", q_BTI, weight, rows, policy)
    if is_for_cpu():  # else XLA puts heads first in the product, and transposes the weight for it
        q_BTHC = jax.lax.optimization_barrier(q_BTHC)
    q_BHTC = q_BTHC.swapaxes(1, 2)
    q_BHTU, q_BHTP = q_BHTC[..., : cfg.nope], rotate(q_BHTC[..., cfg.nope :], turn)
    q_BHTR = jnp.einsum("bhtu,hru->bhtr", q_BHTU, up.key_HRU, out_sharding=spec(*HEADS))
    return jnp.concatenate([q_BHTR, q_BHTP], axis=-1), up


def project_values(
    w: Attention, mixed_BHTR: jax.Array, up: HeadUp, cfg: ModelConfig, policy: Policy
) -> jax.Array:
    """Project mixed latents to values, and those to the output `y_BTD`."""
    y_BHTV = jnp.einsum("bhtr,hvr->bhtv", mixed_BHTR, up.value_HVR, out_sharding=spec(*HEADS))
    return project("bhtv,hvd->btd", y_BHTV, w.out, ("batch", "length", None), policy)


def attend_pages(
    q_BHTM: jax.Array,
    new_BTM: jax.Array,
    latents: jax.Array,
    index: jax.Array | None,
    chunks: Chunks,
    cfg: ModelConfig,
    first: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Write the chunks' latents to their pages, then mix each token's latents by its softmax.

    Args:
        q_BHTM: absorbed queries.
        new_BTM: latents of the same tokens.
        latents: the pool's [pages, page, latent] of this layer, or of all layers of a stack.
        index: of the layer in the stack.
        chunks: where the tokens lie.
        cfg: sizes.
        first: the first place that tokens see.

    Returns:
        `mixed_BHTR`, and the pool with the new latents.

    On a mesh, devices with a part of the heads exchange it for a part of the chunks, those whose
    pages they have, and exchange back what was mixed.
    """
    table = reshard(chunks.table, "cache", None)
    places = (table, reshard(chunks.start_B, "cache"), reshard(chunks.count_B, "cache"))
    if meshless():
        latents = write_latents(latents, new_BTM, *places, index)
        return _mix_latents(q_BHTM, latents, index, places, cfg, first), latents

    def on_device(q_BHTM, new_BTM, latents, index, *places):
        latents = write_latents(latents, new_BTM, *places, index)
        q_BHTM = all_to_all(q_BHTM, "model", 0, 1)
        mixed_BHTR = _mix_latents(q_BHTM, latents, index, places, cfg, first)
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
    places: Places,
    cfg: ModelConfig,
    first: int,
) -> jax.Array:
    """Mix the latents that each token of one device sees: `mixed_BHTR`.

    Chunks of several tokens go through it a few at a time, each time by as many blocks of keys as
    those need: the first chunks of a prompt see little.
    """
    chunks, _, tokens, _ = q_BHTM.shape
    few = CHUNKS_AT_ONCE if tokens > 1 and chunks % CHUNKS_AT_ONCE == 0 else chunks

    def mix_few(args: tuple[jax.Array, ...]) -> jax.Array:
        return _mix_by_blocks(args[0], latents, index, args[1:], cfg, first)

    whole = (q_BHTM, *places)
    if few == chunks:
        return mix_few(whole)
    parts = jax.tree.map(lambda a: a.reshape(chunks // few, few, *a.shape[1:]), whole)
    return jax.lax.map(mix_few, parts).reshape(*q_BHTM.shape[:3], -1)


def _mix_by_blocks(
    q_BHTM: jax.Array,
    latents: jax.Array,
    index: jax.Array | None,
    places: Places,
    cfg: ModelConfig,
    first: int,
) -> jax.Array:
    """Compute `_mix_latents` by an online softmax over blocks of keys."""
    table, start_B, count_B = places
    page, dtype, (chunks, heads, tokens, width) = latents.shape[-2], q_BHTM.dtype, q_BHTM.shape
    pages = max(KEY_BLOCK // page, 1)
    keys = pages * page
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
    q_BNM = q_BHTM.reshape(chunks, heads * tokens, width)  # one dim of products
    position_BN = jnp.tile(start_B[:, None] + jnp.arange(tokens), (1, heads))
    end_B = start_B + count_B

    def add_block(state):
        i, top_BN, sum_BN, mixed_BNM = state
        block = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        place_S = i * keys + jnp.arange(keys)
        # What was never written is selected away: it may be anything, and 0 x NaN is NaN. The
        # barrier keeps the gathered block one array: both products would else gather it.
        written_BS1 = (place_S < end_B[:, None])[..., None]
        latent_BSM = jnp.where(written_BS1, read_pages(latents, block, index), 0).astype(dtype)
        latent_BSM = jax.lax.optimization_barrier(latent_BSM)
        # The latents are the first factor: a CPU then reads their rows in order of memory. Their
        # rotary part is mixed too and dropped at the end, which is cheaper than to cut it off here.
        logit_BSN = jnp.einsum(
            "bsm,bnm->bsn", latent_BSM, q_BNM, preferred_element_type=jnp.float32
        )
        logit_BNS = logit_BSN.transpose(0, 2, 1) * cfg.softmax_scale
        seen_BNS = place_S <= position_BN[..., None]
        if first:
            seen_BNS &= place_S >= first
        logit_BNS = jnp.where(seen_BNS, logit_BNS, NEG_INF)
        old_BN, top_BN = top_BN, jnp.maximum(top_BN, logit_BNS.max(axis=-1))
        weight_BNS = jnp.exp(logit_BNS - top_BN[..., None])
        factor_BN = jnp.exp(old_BN - top_BN)
        more_BNM = jnp.einsum(
            "bns,bsm->bnm",
            weight_BNS.astype(dtype),
            latent_BSM,
            preferred_element_type=jnp.float32,
        )
        sum_BN = sum_BN * factor_BN + weight_BNS.sum(axis=-1)
        return i + 1, top_BN, sum_BN, mixed_BNM * factor_BN[..., None] + more_BNM

    rows = (chunks, heads * tokens)
    start = (
        jnp.int32(0),
        jnp.full(rows, NEG_INF, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, width), jnp.float32),
    )
    last = (end_B.max() - 1) // keys
    _, _, sum_BN, mixed_BNM = jax.lax.while_loop(lambda s: s[0] <= last, add_block, start)
    mixed_BNR = (mixed_BNM[..., : cfg.kv_rank] / sum_BN[..., None]).astype(dtype)
    return mixed_BNR.reshape(chunks, heads, tokens, -1)
