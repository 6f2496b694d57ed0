"""Kernels of attention visit the blocks that see each other, and hardly any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.visits import ALL, BEGIN, END, SOME, kinds, possible, visits

QUERIES, KEYS = 2, 4  # of a block
ROWS = [[1] * 24, [1] * 9 + [2] * 7 + [3] * 8, [1] * 10 + [2] * 6 + [0] * 8]


def seen_blocks(segment, first, length):
    """How many pairs of each two blocks are seen, [B, Q, K]."""
    order = np.arange(segment.shape[1])
    own = slice(first, first + length)
    seen = segment[:, own, None] == segment[:, None]
    seen &= order[own, None] >= order
    return seen.reshape(len(segment), length // QUERIES, QUERIES, -1, KEYS).sum((2, 4))


@pytest.mark.parametrize("keys_held", [False, True])
@pytest.mark.parametrize(("first", "length"), [(0, 24), (8, 12)])
def test_visits_are_those_of_blocks_that_see_each_other(keys_held, first, length):
    segment = np.array(ROWS)
    segments = (jnp.array(segment[:, first : first + length]), jnp.array(segment))
    kind = kinds(segments, (QUERIES, KEYS), jnp.int32(first))
    right = seen_blocks(segment, first, length)
    assert np.array_equal(np.asarray(kind), np.sign(right) * SOME + (right == QUERIES * KEYS))

    may = possible((QUERIES, KEYS), kind.shape[1:], first == 0)
    table, count = visits(kind, may, keys_held)
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
    # Each block is held once, also one that meets nobody: something must be written.
    assert starts.sum() == len(ROWS) * kind.shape[2 if keys_held else 1]
