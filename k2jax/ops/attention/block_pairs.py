"""Which blocks of queries and keys see each other, as a table that a kernel walks along."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SOME, ALL = 1, 2  # pairs of two blocks are seen; 0: none
BEGIN, END = 4, 8  # of the visits to a block that is held
NOBODY = 2**30  # padding, which rows end with, comes after every document


class BlockSchedule(NamedTuple):
    """Pairs of blocks; those of a block that is held stand one after the other."""

    batch_N: jax.Array
    query_N: jax.Array
    key_N: jax.Array
    what_N: jax.Array  # SOME or ALL, with BEGIN, with END


def kinds(segment_BT: jax.Array, block: int) -> jax.Array:
    """Whether 0, SOME or ALL pairs of a block of queries and one of keys are seen, [B, Q, K].

    Args:
        segment_BT: documents; T is a multiple of the block.
        block: how many queries, or keys, make one.

    SOME is said of blocks whose ranges of document numbers overlap; so it may be none, where
    documents do not stand in order.
    """
    rank_BT = jnp.where(segment_BT > 0, segment_BT, NOBODY - segment_BT)
    rank_BNL = rank_BT.reshape(rank_BT.shape[0], -1, block)
    low_BN, high_BN = rank_BNL.min(2), rank_BNL.max(2)
    meet = (low_BN[:, :, None] <= high_BN[:, None]) & (low_BN[:, None] <= high_BN[:, :, None])
    n = jnp.arange(low_BN.shape[1])
    some = meet & (n[:, None] >= n)
    one_BN = low_BN == high_BN
    every = some & one_BN[:, :, None] & one_BN[:, None] & (n[:, None] > n)
    return jnp.where(every, ALL, jnp.where(some, SOME, 0))


def visits(kind_BQK: jax.Array, keys_held: bool) -> tuple[BlockSchedule, jax.Array]:
    """Table of visits, and how many of its rows are to be used.

    Args:
        kind_BQK: as `kinds` says; every block meets itself.
        keys_held: blocks of keys are held while those of queries pass, else the other way round.
    """
    kind_BHP = kind_BQK.swapaxes(1, 2) if keys_held else kind_BQK
    visit = kind_BHP > 0
    begin = visit & (jnp.cumsum(visit, 2) == 1)
    end = visit & (jnp.cumsum(visit[..., ::-1], 2)[..., ::-1] == 1)
    what_BHP = kind_BHP + BEGIN * begin + END * end
    number_N = jnp.arange(visit.size, dtype=jnp.int32)
    _, *columns = jax.lax.sort((~visit.ravel(), number_N, what_BHP.ravel()), num_keys=1)
    batch, blocks, _ = kind_BHP.shape
    rows = batch * blocks * (blocks + 1) // 2  # as many as the diagonal leaves
    number_N, what_N = (column[:rows] for column in columns)
    batch_N, held_N, passing_N = jnp.unravel_index(number_N, visit.shape)
    query_N, key_N = (passing_N, held_N) if keys_held else (held_N, passing_N)
    return BlockSchedule(batch_N, query_N, key_N, what_N), visit.sum(dtype=jnp.int32)
