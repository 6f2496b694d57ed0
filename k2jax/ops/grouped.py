"""Grouped matmul: rows sorted by group, each group times its own matrix."""

import functools

import jax
import jax.numpy as jnp


def grouped_dot(x_MK: jax.Array, w_GKN: jax.Array, size_G: jax.Array) -> jax.Array:
    """Rows of group g times `w_GKN[g]`, `y_MN` in `x_MK`'s dtype.

    Args:
        x_MK: rows sorted by group; the first `size_G[0]` belong to group 0, and so on.
        w_GKN: one matrix a group, same dtype.
        size_G: int32 rows of each group; rows beyond their sum give zeros.

    TPUs have it natively. XLA's CPU backend would multiply every row by every group's matrix, so
    there it goes through the groups in blocks of rows and skips what no group owns.
    """
    return jax.lax.platform_dependent(
        x_MK, w_GKN, size_G, cpu=block_dot, default=jax.lax.ragged_dot
    )


def reference_dot(x_MK: jax.Array, w_GKN: jax.Array, size_G: jax.Array) -> jax.Array:
    """The same by multiplying every row by every group's matrix."""
    end_G = jnp.cumsum(size_G)
    row_M = jnp.arange(x_MK.shape[0])[:, None]
    own_MG = (row_M >= end_G - size_G) & (row_M < end_G)
    return jnp.einsum("mk,gkn,mg->mn", x_MK, w_GKN, own_MG.astype(x_MK.dtype))


def _block_rows(rows: int, groups: int) -> int:
    """Rows a block: about a quarter of a group's average, so that little is padded."""
    return min(256, max(8, 1 << (rows // groups // 4).bit_length()))


def _schedule(size_G: jax.Array, rows: int, block: int) -> tuple[jax.Array, ...]:
    """How many blocks there are; and of each block its group, first row and rows."""
    groups = size_G.shape[0]
    blocks_G = -(-size_G // block)
    last_G = jnp.cumsum(blocks_G)
    index_I = jnp.arange(rows // block + groups, dtype=jnp.int32)
    group_I = jnp.minimum(jnp.searchsorted(last_G, index_I, side="right"), groups - 1)
    within_I = (index_I - (last_G - blocks_G)[group_I]) * block
    first_I = (jnp.cumsum(size_G) - size_G)[group_I] + within_I
    return last_G[-1], group_I, first_I, size_G[group_I] - within_I


@jax.custom_vjp
def block_dot(x_MK: jax.Array, w_GKN: jax.Array, size_G: jax.Array) -> jax.Array:
    """`grouped_dot` block by block, for backends where a loop costs little."""
    rows, block = x_MK.shape[0], _block_rows(x_MK.shape[0], w_GKN.shape[0])
    count, group_I, first_I, rows_I = _schedule(size_G, rows, block)
    x_MK = jnp.pad(x_MK, ((0, block), (0, 0)))

    def one(i: jax.Array, y_MN: jax.Array) -> jax.Array:
        x_IK = jax.lax.dynamic_slice_in_dim(x_MK, first_I[i], block)
        y_IN = jnp.dot(_mask(x_IK, rows_I[i]), w_GKN[group_I[i]])
        # A block may run into the next group's rows: zeros there, which that group overwrites.
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_IN, first_I[i], 0)

    y_MN = jnp.zeros((rows + block, w_GKN.shape[2]), x_MK.dtype)
    return jax.lax.fori_loop(0, count, one, y_MN)[:rows]


def _mask(x_IK: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x_IK.shape[0])[:, None] < rows, x_IK, 0)


def _block_outer(x_MK: jax.Array, y_MN: jax.Array, size_G: jax.Array) -> jax.Array:
    """Each group's `x^T y`, [groups, K, N]."""
    rows, block = x_MK.shape[0], _block_rows(x_MK.shape[0], size_G.shape[0])
    count, group_I, first_I, rows_I = _schedule(size_G, rows, block)
    x_MK, y_MN = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MK, y_MN))

    def one(i: jax.Array, w_GKN: jax.Array) -> jax.Array:
        x_IK = jax.lax.dynamic_slice_in_dim(x_MK, first_I[i], block)
        y_IN = jax.lax.dynamic_slice_in_dim(y_MN, first_I[i], block)
        w_KN = jax.lax.dot_general(
            _mask(x_IK, rows_I[i]), y_IN, (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return w_GKN.at[group_I[i]].add(w_KN)

    shape = (size_G.shape[0], x_MK.shape[1], y_MN.shape[1])
    return jax.lax.fori_loop(0, count, one, jnp.zeros(shape, jnp.float32)).astype(x_MK.dtype)


def _forward(x_MK: jax.Array, w_GKN: jax.Array, size_G: jax.Array):
    return block_dot(x_MK, w_GKN, size_G), (x_MK, w_GKN, size_G)


def _backward(saved: tuple[jax.Array, ...], dy_MN: jax.Array):
    x_MK, w_GKN, size_G = saved
    dx_MK = block_dot(dy_MN, w_GKN.mT, size_G)
    return dx_MK, _block_outer(x_MK, dy_MN, size_G), None


block_dot.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather_rows(x_ND: jax.Array, order_M: jax.Array, place_M: jax.Array, copies: int) -> jax.Array:
    """Row `order_M[m] // copies` of `x_ND` for each m: every row `copies` times, permuted.

    Args:
        x_ND: rows.
        order_M: int32 permutation of `copies` x rows.
        place_M: its inverse, so that the gradient is a gather and a sum, not a scatter.
        copies: how often each row is taken.
    """
    del place_M
    return x_ND[order_M // copies]


def _gather_forward(x_ND, order_M, place_M, copies):
    return gather_rows(x_ND, order_M, place_M, copies), place_M


def _gather_backward(copies, place_M, dy_MD):
    dy_NKD = dy_MD[place_M].reshape(-1, copies, dy_MD.shape[-1])
    return dy_NKD.astype(jnp.float32).sum(axis=1).astype(dy_MD.dtype), None, None


gather_rows.defvjp(_gather_forward, _gather_backward)
