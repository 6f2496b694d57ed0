"""Which blocks of queries and keys see each other, as a table that a kernel walks along."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SOME, ALL = 1, 2  # pairs of two blocks are seen; 0: none, visited for nothing but to write zeros
BEGIN, END = 4, 8  # of the visits to a block that is held
NOBODY = 2**30  # padding, which rows end with, comes after every document


class Visits(NamedTuple):
    """Pairs of blocks; those of a block that is held stand one after the other."""

    batch_N: jax.Array
    query_N: jax.Array
    key_N: jax.Array
    what_N: jax.Array  # SOME or ALL, with BEGIN, with END


def kinds(segments: Sequence[jax.Array], blocks: tuple[int, int]) -> jax.Array:
    """Whether 0, SOME or ALL pairs of a block of queries and one of keys are seen, [B, Q, K].

    Args:
        segments: documents of queries [B, T] and keys [B, S]; lengths are multiples of the blocks.
        blocks: how many queries and keys make one.

    SOME is said of blocks whose ranges of document numbers overlap; so it may be none, where
    documents do not stand in order.
    """

    def ranges(segment_BL, block):
        rank_BL = jnp.where(segment_BL > 0, segment_BL, NOBODY - segment_BL)
        rank_BNL = rank_BL.reshape(rank_BL.shape[0], -1, block)
        return rank_BNL.min(2), rank_BNL.max(2)

    queries, keys = map(ranges, segments, blocks)
    low_q, high_q = (a[:, :, None] for a in queries)
    low_k, high_k = (a[:, None] for a in keys)
    begin_Q1 = blocks[0] * jnp.arange(low_q.shape[1])[:, None]
    begin_K = blocks[1] * jnp.arange(low_k.shape[2])
    some = (low_q <= high_k) & (low_k <= high_q) & (begin_K < begin_Q1 + blocks[0])
    one = (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
    every = one & (begin_K + blocks[1] <= begin_Q1 + 1)
    return jnp.where(every, ALL, jnp.where(some, SOME, 0))


def possible(blocks: tuple[int, int], counts: tuple[int, int]) -> np.ndarray:
    """Pairs [Q, K] that may have to be visited whatever the documents are."""
    query, key = np.arange(counts[0])[:, None], np.arange(counts[1])
    return key * blocks[1] < (query + 1) * blocks[0]


def visits(kind_BQK: jax.Array, may_QK: np.ndarray, keys_held: bool) -> tuple[Visits, jax.Array]:
    """Table of visits, and how many of its rows are to be used.

    Args:
        kind_BQK: as `kinds` says. A block that meets nobody is visited once.
        may_QK: as `possible` says; bounds the table.
        keys_held: blocks of keys are held while those of queries pass, else the other way round.
    """
    kind_BHP = kind_BQK.swapaxes(1, 2) if keys_held else kind_BQK
    last = jnp.arange(kind_BHP.shape[2]) == kind_BHP.shape[2] - 1
    visit = (kind_BHP > 0) | last & (kind_BHP == 0).all(2, keepdims=True)
    begin = visit & (jnp.cumsum(visit, 2) == 1)
    end = visit & (jnp.cumsum(visit[..., ::-1], 2)[..., ::-1] == 1)
    what_BHP = kind_BHP + BEGIN * begin + END * end
    number_N = jnp.arange(visit.size, dtype=jnp.int32)
    _, *columns = jax.lax.sort((~visit.ravel(), number_N, what_BHP.ravel()), num_keys=1)
    rows = kind_BHP.shape[0] * int(np.maximum(may_QK.sum(0 if keys_held else 1), 1).sum())
    number_N, what_N = (column[:rows] for column in columns)
    batch_N, held_N, passing_N = jnp.unravel_index(number_N, visit.shape)
    query_N, key_N = (passing_N, held_N) if keys_held else (held_N, passing_N)
    return Visits(batch_N, query_N, key_N, what_N), visit.sum(dtype=jnp.int32)
