"""Cut rows that are sorted by group into tiles of one group each."""

import jax
import jax.numpy as jnp


def cut_into_tiles(
    size_E: jax.Array, rows: int, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List each tile's group, first row and end of the group's rows; int32 [count].

    Args:
        size_E: int32, rows of each group, those of group 0 first.
        rows: at most, of a tile; the last one of a group has the rest, end - first.
        count: tiles; those that no group needs begin at its end or after it.
    """
    tiles_E = -(-size_E // rows)
    begin_E, last_E = jnp.cumsum(size_E) - size_E, jnp.cumsum(tiles_E)
    tile_T = jnp.arange(count, dtype=jnp.int32)
    group_T = jnp.searchsorted(last_E, tile_T, side="right", method="compare_all")
    group_T = jnp.minimum(group_T, size_E.size - 1).astype(jnp.int32)
    first_T = begin_E[group_T] + (tile_T - (last_E - tiles_E)[group_T]) * rows
    return group_T, first_T, begin_E[group_T] + size_E[group_T]


def cut_into_blocks(size_E: jax.Array, rows: int, count: int) -> tuple[jax.Array, ...]:
    """List each tile's group, block, and the group's first row and end in it; int32 [count].

    Args:
        size_E: int32, rows of each group, those of group 0 first.
        rows: of a block; blocks begin at a multiple of it, and groups may share one.
        count: tiles; those that no group needs end where they begin.
    """
    end_E = jnp.cumsum(size_E)
    begin_E = end_E - size_E
    first_E = begin_E // rows
    tiles_E = jnp.where(size_E > 0, -(-end_E // rows) - first_E, 0)
    last_E, tile_T = jnp.cumsum(tiles_E), jnp.arange(count, dtype=jnp.int32)
    group_T = jnp.searchsorted(last_E, tile_T, side="right", method="compare_all")
    needed_T, group_T = group_T < size_E.size, jnp.minimum(group_T, size_E.size - 1)
    block_T = first_E[group_T] + tile_T - (last_E - tiles_E)[group_T]
    begin_T = jnp.maximum(begin_E[group_T], block_T * rows)
    end_T = jnp.where(needed_T, jnp.minimum(end_E[group_T], (block_T + 1) * rows), begin_T)
    table = group_T, jnp.where(needed_T, block_T, 0), begin_T, end_T
    return tuple(a.astype(jnp.int32) for a in table)
