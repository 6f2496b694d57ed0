"""Kernels of attention visit the blocks that see each other, and hardly any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.attention.block_pairs import (
    ALL,
    BEGIN,
    END,
    SOME,
    classify_block_pairs,
    schedule_blocks,
)

BLOCK = 2
ROWS = [[1] * 24, [1] * 9 + [2] * 7 + [3] * 8, [1] * 10 + [2] * 6 + [0] * 8]


def seen_blocks(segment):
    """How many pairs of each two blocks are seen, [B, Q, K]."""
    order = np.arange(segment.shape[1])
    seen = segment[:, :, None] == segment[:, None]
    seen &= order[:, None] >= order
    blocks = order.size // BLOCK
    return seen.reshape(len(segment), blocks, BLOCK, blocks, BLOCK).sum((2, 4))


@pytest.mark.parametrize("keys_held", [False, True])
def test_scheduled_pairs_are_those_of_blocks_that_see_each_other(keys_held):
    segment = np.array(ROWS)
    kind = classify_block_pairs(jnp.array(segment), BLOCK)
    right = seen_blocks(segment)
    assert np.array_equal(np.asarray(kind), np.sign(right) * SOME + (right == BLOCK**2))

    table, count = schedule_blocks(kind, keys_held)
    rows = np.stack(jax.device_get(table), axis=1)[: int(count)]
    assert len(rows) == count
    found = np.zeros_like(right)
    for batch, query, key, what in rows:
        found[batch, query, key] = what & (SOME | ALL)
    assert np.array_equal(found, kind)
    held = rows[:, [0, 2 if keys_held else 1]]
    starts = np.r_[True, (held[1:] != held[:-1]).any(1)]
    assert np.array_equal(rows[:, 3] & BEGIN > 0, starts)
    assert np.array_equal(rows[:, 3] & END > 0, np.r_[starts[1:], True])
    assert starts.sum() == len(ROWS) * kind.shape[1]  # each block is held once
