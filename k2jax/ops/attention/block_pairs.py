"""A table of the blocks of queries and keys that see each other, for a kernel to walk along."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SOME, ALL = 1, 2  # of the pairs of two blocks are seen; 0: none
BEGIN, END = 4, 8  # first and last pair of a block that is held
PADDING = 2**30  # padding, which rows end with, comes after every document


class BlockSchedule(NamedTuple):
    """Pairs of blocks to compute; those of a block that is held are consecutive."""

    batch_N: jax.Array
    query_N: jax.Array
    key_N: jax.Array
    flags_N: jax.Array  # SOME or ALL, with BEGIN, with END


def classify_block_pairs(segment_BT: jax.Array, block: int) -> jax.Array:
    """Say whether 0, SOME or ALL pairs of a block of queries and one of keys are seen, [B, Q, K].

    Args:
        segment_BT: documents; T is a multiple of the block.
        block: queries, or keys, of a block.

    SOME are blocks whose ranges of document numbers overlap; where documents are not in order,
    such a pair may have nothing to see.
    """
    rank_BT = jnp.where(segment_BT > 0, segment_BT, PADDING - segment_BT)
    rank_BNL = rank_BT.reshape(rank_BT.shape[0], -1, block)
    low_BN, high_BN = rank_BNL.min(2), rank_BNL.max(2)
    meet = (low_BN[:, :, None] <= high_BN[:, None]) & (low_BN[:, None] <= high_BN[:, :, None])
    n = jnp.arange(low_BN.shape[1])
    some = meet & (n[:, None] >= n)
    one_BN = low_BN == high_BN
    every = some & one_BN[:, :, None] & one_BN[:, None] & (n[:, None] > n)
    return jnp.where(every, ALL, jnp.where(some, SOME, 0))


def schedule_blocks(kind_BQK: jax.Array, keys_held: bool) -> tuple[BlockSchedule, jax.Array]:
    """List the pairs of blocks to compute, and count the rows of the list that are in use.

    Args:
        kind_BQK: from `classify_block_pairs`; every block meets itself.
        keys_held: keep a block of keys while those of queries pass; else the other way round.
    """
    kind_BHP = kind_BQK.swapaxes(1, 2) if keys_held else kind_BQK
    used = kind_BHP > 0
    begin = used & (jnp.cumsum(used, 2) == 1)
    end = used & (jnp.cumsum(used[..., ::-1], 2)[..., ::-1] == 1)
    flags_BHP = kind_BHP + BEGIN * begin + END * end
    number_N = jnp.arange(used.size, dtype=jnp.int32)
    _, *columns = jax.lax.sort((~used.ravel(), number_N, flags_BHP.ravel()), num_keys=1)
    batch, blocks, _ = kind_BHP.shape
    rows = batch * blocks * (blocks + 1) // 2  # as many as the diagonal leaves
    number_N, flags_N = (column[:rows] for column in columns)
    batch_N, held_N, passing_N = jnp.unravel_index(number_N, used.shape)
    query_N, key_N = (passing_N, held_N) if keys_held else (held_N, passing_N)
    return BlockSchedule(batch_N, query_N, key_N, flags_N), used.sum(dtype=jnp.int32)
