"""Rows of groups are cut into tiles, none of them lost."""

import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.moe.tiles import cut_into_blocks

ROWS = 8


@pytest.mark.parametrize("sizes", [(5, 0, 17, 2), (8, 8, 8, 0), (0, 0, 0, 24), (1, 1, 1, 21)])
def test_each_row_is_in_one_tile_of_its_group_which_begins_at_a_whole_block(sizes):
    total, count = sum(sizes), sum(sizes) // ROWS + len(sizes)
    table = cut_into_blocks(jnp.asarray(sizes, jnp.int32), ROWS, count)
    group_M, tiles_M = np.full(total, -1), np.zeros(total, int)
    for group, block, begin, end in zip(*map(np.asarray, table), strict=True):
        assert begin >= end or block * ROWS <= begin < end <= (block + 1) * ROWS
        group_M[begin:end] = group
        tiles_M[begin:end] += 1
    assert (tiles_M == 1).all()
    assert (group_M == np.repeat(np.arange(len(sizes)), sizes)).all()
