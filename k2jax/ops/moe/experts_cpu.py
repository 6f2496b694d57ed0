"""The chosen experts' MLPs on CPUs, by blocks of rows.

XLA's CPU backend would multiply every row by every expert. Here a block holds up to `rows` sorted
pairs of one expert, which go through the whole MLP while they are in cache. A block may extend into
the next expert's pairs: what it writes into them, that expert overwrites, and what comes after the
last one is multiplied by weight 0.
"""

import jax
import jax.numpy as jnp

from k2jax.ops.moe.tiles import cut_into_tiles
from k2jax.ops.moe.weights import Weights, split_gate_up


def _block_rows(pairs: int, experts: int) -> int:
    """Choose the rows of a block: half of an expert's average, so that the last is rarely empty."""
    return min(256, max(8, 1 << max((pairs // experts // 2).bit_length() - 1, 0)))


class _Blocks:
    """The blocks that the forward and the backward pass go through."""

    def __init__(self, order_M: jax.Array, size_E: jax.Array, copies: int):
        pairs = order_M.shape[0]
        self.rows = _block_rows(pairs, size_E.shape[0])
        most = pairs // self.rows + size_E.shape[0]
        self.expert_I, self.first_I, end_I = cut_into_tiles(size_E, self.rows, most)
        self.count, self.size_I = (-(-size_E // self.rows)).sum(), end_I - self.first_I
        self.pair_M = jnp.pad(order_M, (0, self.rows))
        self.token_M = self.pair_M // copies

    def is_own(self, i: jax.Array) -> jax.Array:
        """Which rows of the block are its expert's."""
        return jnp.arange(self.rows) < self.size_I[i]

    def read(self, a: jax.Array, i: jax.Array) -> jax.Array:
        """Read the block's rows."""
        return jax.lax.dynamic_slice_in_dim(a, self.first_I[i], self.rows)

    def write(self, a: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
        """Replace the block's rows in `a`."""
        return jax.lax.dynamic_update_slice_in_dim(a, block.astype(a.dtype), self.first_I[i], 0)

    def zeros(self, *width: int, dtype: jnp.dtype) -> jax.Array:
        """Make an array with one row per pair."""
        return jnp.zeros((*self.pair_M.shape, *width), dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply, accumulating in float32: the fastest form of a product here."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _outer(a_BK: jax.Array, b_BN: jax.Array) -> jax.Array:
    """Multiply `a^T b`. The barrier keeps the transposition apart: fused it is slow."""
    a_KB = jax.lax.optimization_barrier(a_BK.T)
    return jnp.dot(a_KB, b_BN, preferred_element_type=jnp.float32)


@jax.custom_vjp
def expert_mlp_by_blocks(
    x_ND: jax.Array,
    order_M: jax.Array,
    place_M: jax.Array,
    size_E: jax.Array,
    weight_NK: jax.Array,
    weights: Weights,
) -> jax.Array:
    """Compute `expert_mlp` of sorted pairs, block by block."""
    return _forward(x_ND, order_M, place_M, size_E, weight_NK, weights)[0]


def _forward(x_ND, order_M, place_M, size_E, weight_NK, weights):
    gate_up_EDG, down_EFD = weights
    blocks = _Blocks(order_M, size_E, weight_NK.shape[1])
    x_MD = x_ND[blocks.token_M]

    def one(i, carry):
        y_MD, gate_up_MG = carry
        e = blocks.expert_I[i]
        gate_up_BG = _dot(blocks.read(x_MD, i), gate_up_EDG[e])
        gate_BF, up_BF = split_gate_up(gate_up_BG)
        y_BD = _dot(jax.nn.silu(gate_BF) * up_BF, down_EFD[e])
        return blocks.write(y_MD, i, y_BD), blocks.write(gate_up_MG, i, gate_up_BG)

    widths = (x_ND.shape[1], gate_up_EDG.shape[2])
    start = tuple(blocks.zeros(width, dtype=x_ND.dtype) for width in widths)
    y_MD, gate_up_MG = jax.lax.fori_loop(0, blocks.count, one, start)
    saved = (x_ND, order_M, place_M, size_E, weight_NK, weights, gate_up_MG)
    y_NKD = y_MD[place_M].reshape(*weight_NK.shape, -1).astype(jnp.float32)
    return jnp.einsum("nkd,nk->nd", y_NKD, weight_NK).astype(y_MD.dtype), saved


def _backward(saved, dy_ND):
    x_ND, order_M, place_M, size_E, weight_NK, weights, gate_up_MG = saved
    gate_up_EDG, down_EFD = weights
    blocks = _Blocks(order_M, size_E, weight_NK.shape[1])
    x_MD, dy_MD = x_ND[blocks.token_M], dy_ND[blocks.token_M]
    weight_M = weight_NK.reshape(-1)[blocks.pair_M]

    def one(i, carry):
        dx_MD, dweight_M, dgate_up_EDG, ddown_EFD = carry
        e, own_B = blocks.expert_I[i], blocks.is_own(i)
        x_BD, dy_BD = blocks.read(x_MD, i), blocks.read(dy_MD, i)
        gate_BF, up_BF = split_gate_up(blocks.read(gate_up_MG, i))
        # Weight 0 for other experts' pairs keeps them out of this one's gradients.
        weight_B1 = jnp.where(own_B, blocks.read(weight_M, i), 0)[:, None].astype(x_ND.dtype)

        slope_BF = jax.nn.sigmoid(gate_BF)
        silu_BF = gate_BF * slope_BF
        h_BF = silu_BF * up_BF
        dh_BF = _dot(dy_BD, down_EFD[e].T)
        dweight_B = jnp.where(own_B, (h_BF * dh_BF).astype(jnp.float32).sum(axis=1), 0)
        dh_BF *= weight_B1
        dgate_BF = dh_BF * up_BF * (slope_BF + silu_BF * (1 - slope_BF))
        dgate_up_BG = jnp.concatenate([dgate_BF, dh_BF * silu_BF], axis=1)
        return (
            blocks.write(dx_MD, i, _dot(dgate_up_BG, gate_up_EDG[e].T)),
            blocks.write(dweight_M, i, dweight_B),
            dgate_up_EDG.at[e].add(_outer(x_BD, dgate_up_BG)),
            ddown_EFD.at[e].add(_outer(h_BF * weight_B1, dy_BD)),
        )

    start = (
        blocks.zeros(x_ND.shape[1], dtype=x_ND.dtype),
        blocks.zeros(dtype=jnp.float32),
        *(jnp.zeros(w.shape, jnp.float32) for w in weights),
    )
    dx_MD, dweight_M, *dweights = jax.lax.fori_loop(0, blocks.count, one, start)
    dx_NKD = dx_MD[place_M].reshape(*weight_NK.shape, -1)
    dx_ND = dx_NKD.astype(jnp.float32).sum(axis=1).astype(x_ND.dtype)
    dweight_NK = dweight_M[place_M].reshape(weight_NK.shape)
    dweights = tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True))
    return dx_ND, None, None, None, dweight_NK, dweights


expert_mlp_by_blocks.defvjp(_forward, _backward)
