"""The chosen experts' MLPs: each token through its experts, summed by weight."""

import functools

import jax
import jax.numpy as jnp

from k2jax.ops.moe.grouped_matmul import grouped
from k2jax.ops.moe.tiles import tiles_of

# gate_up_EDG, each expert's gate beside its up-projection (G = 2 F), and down_EFD: one product
# reads a row once, and its gradient is one sum.
Weights = tuple[jax.Array, jax.Array]


def side_by_side(gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array) -> Weights:
    """The weights as the products take them."""
    return jnp.concatenate([gate_EDF, up_EDF], axis=-1), down_EFD


def _halves(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gate and up, along the last dim."""
    width = gate_up.shape[-1] // 2
    return gate_up[..., :width], gate_up[..., width:]


def expert_mlp(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights
) -> jax.Array:
    """Sum over a token's experts of weight times `down(silu(gate x) * up x)`, in `x_ND`'s dtype.

    Args:
        x_ND: tokens.
        expert_NK: int32 experts of each token, each at most once; those outside of 0..E-1 are some
            other device's and contribute nothing.
        weight_NK: float32.
        weights: in `x_ND`'s dtype.

    Tokens are sorted by expert; nothing is dropped or padded to a capacity. Outputs are combined in
    float32. TPUs multiply groups of rows natively; XLA's CPU backend would multiply every row by
    every expert, so there it goes through the experts in blocks of rows.
    """
    order_M, place_M, size_E, weight_NK = sort_by_expert(expert_NK, weight_NK, weights[0].shape[0])
    return jax.lax.platform_dependent(
        x_ND, order_M, place_M, size_E, weight_NK, weights, cpu=by_blocks, default=by_groups
    )


def reference_mlp(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights
) -> jax.Array:
    """The same by running every expert on every token."""
    gate_up_EDG, down_EFD = weights
    gate_NEF, up_NEF = _halves(jnp.einsum("nd,edg->neg", x_ND, gate_up_EDG))
    y_NED = jnp.einsum("nef,efd->ned", jax.nn.silu(gate_NEF) * up_NEF, down_EFD)
    chosen_NKE = expert_NK[..., None] == jnp.arange(down_EFD.shape[0])
    share_NE = jnp.where(chosen_NKE, weight_NK[..., None], 0.0).sum(axis=1)
    return jnp.einsum("ned,ne->nd", y_NED.astype(jnp.float32), share_NE).astype(x_ND.dtype)


def sort_by_expert(expert_NK: jax.Array, weight_NK: jax.Array, experts: int):
    """Order of the (token, choice) pairs by expert, its inverse, and pairs of each expert."""
    expert_M = expert_NK.reshape(-1)
    here_M = (expert_M >= 0) & (expert_M < experts)
    order_M = jnp.argsort(jnp.where(here_M, expert_M, experts))  # those of other devices last
    # The inverse by a scatter: half the time of a second sort.
    rank_M = jnp.arange(order_M.size, dtype=order_M.dtype)
    place_M = jnp.zeros_like(order_M).at[order_M].set(rank_M, unique_indices=True)
    size_E = (expert_M == jnp.arange(experts)[:, None]).sum(axis=1, dtype=jnp.int32)
    return order_M, place_M, size_E, jnp.where(here_M.reshape(weight_NK.shape), weight_NK, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def unpermute_and_sum(
    y_MD: jax.Array, order_M: jax.Array, place_M: jax.Array, tokens: int
) -> jax.Array:
    """Sums of each token's sorted rows, in float32 and back: the opposite of `permute_tokens`.

    A choice at a time, so that rows in the order of tokens are never all there.
    """
    place_KN = place_M.reshape(tokens, -1).T
    y_ND = jnp.zeros((tokens, y_MD.shape[1]), jnp.float32)
    for place_N in place_KN:
        y_ND += y_MD[place_N].astype(jnp.float32)
    return y_ND.astype(y_MD.dtype)


@jax.custom_vjp
def permute_tokens(x_ND: jax.Array, order_M: jax.Array, place_M: jax.Array) -> jax.Array:
    """A row for each sorted pair. Its gradient gathers: TPUs compile wide scatters for minutes."""
    return x_ND[order_M // (order_M.shape[0] // x_ND.shape[0])]


unpermute_and_sum.defvjp(
    lambda y_MD, order_M, place_M, tokens: (
        unpermute_and_sum(y_MD, order_M, place_M, tokens),
        (order_M, place_M),
    ),
    lambda _, saved, dy_ND: (permute_tokens(dy_ND, *saved), None, None),
)
permute_tokens.defvjp(
    lambda x_ND, order_M, place_M: (
        permute_tokens(x_ND, order_M, place_M),
        (order_M, place_M, jnp.zeros((x_ND.shape[0], 0))),
    ),
    lambda saved, dx_MD: (unpermute_and_sum(dx_MD, *saved[:2], saved[2].shape[0]), None, None),
)


@jax.custom_vjp
def permute_rows(a_M1: jax.Array, order_M: jax.Array, place_M: jax.Array) -> jax.Array:
    """Rows in another order; `place_M` is its inverse, by which the gradient is gathered."""
    return a_M1[order_M]


permute_rows.defvjp(
    lambda a_M1, order_M, place_M: (a_M1[order_M], place_M),
    lambda place_M, da_M1: (da_M1[place_M], None, None),
)


def sorted_mlp(
    x_MD: jax.Array, weight_M1: jax.Array, weights: Weights, size_E: jax.Array
) -> jax.Array:
    """Rows through the expert of their group, times their weight.

    Args:
        x_MD: rows, those of expert 0 first.
        weight_M1: float32; 0 for rows of no expert.
        weights: as those of `expert_mlp`.
        size_E: int32, rows of each expert.
    """
    rows_M = jnp.arange(x_MD.shape[0], dtype=jnp.int32)
    return jax.lax.platform_dependent(
        x_MD, weight_M1, weights, size_E,
        cpu=lambda x, weight, weights, size: by_blocks(x, rows_M, rows_M, size, weight, weights),
        default=sorted_by_groups,
    )  # fmt: skip


def sorted_by_groups(
    x_MD: jax.Array, weight_M1: jax.Array, weights: Weights, size_E: jax.Array
) -> jax.Array:
    """`sorted_mlp` by grouped products.

    The weight is applied between them, where rows are narrow, and so that its gradient does not
    need the output.
    """
    gate_up_EDG, down_EFD = weights
    gate_MF, up_MF = _halves(grouped(x_MD, gate_up_EDG, size_E))
    h_MF = (jax.nn.silu(gate_MF) * up_MF).astype(jnp.float32) * weight_M1
    return grouped(h_MF.astype(x_MD.dtype), down_EFD, size_E)


def by_groups(
    x_ND: jax.Array, order_M: jax.Array, place_M: jax.Array, size_E: jax.Array,
    weight_NK: jax.Array, weights: Weights,
) -> jax.Array:  # fmt: skip
    """`expert_mlp` of sorted pairs by grouped products."""
    x_MD = permute_tokens(x_ND, order_M, place_M)
    weight_M1 = permute_rows(weight_NK.reshape(-1, 1), order_M, place_M)
    y_MD = sorted_by_groups(x_MD, weight_M1, weights, size_E)
    return unpermute_and_sum(y_MD, order_M, place_M, x_ND.shape[0])


# By blocks. Block i holds up to `rows` sorted pairs of one expert, which go through the whole MLP
# while they are in cache. A block may run into the next expert's pairs: what it writes there, that
# expert overwrites, and what comes after the last one is multiplied by weight 0.


def _block_rows(pairs: int, experts: int) -> int:
    """About half of an expert's average, so that little of the last block is empty."""
    return min(256, max(8, 1 << max((pairs // experts // 2).bit_length() - 1, 0)))


class _Blocks:
    """The walk over blocks that the forward and the backward pass share."""

    def __init__(self, order_M: jax.Array, size_E: jax.Array, copies: int):
        pairs = order_M.shape[0]
        self.rows = _block_rows(pairs, size_E.shape[0])
        most = pairs // self.rows + size_E.shape[0]
        self.expert_I, self.first_I, end_I = tiles_of(size_E, self.rows, most)
        self.count, self.size_I = (-(-size_E // self.rows)).sum(), end_I - self.first_I
        self.pair_M = jnp.pad(order_M, (0, self.rows))
        self.token_M = self.pair_M // copies

    def own(self, i: jax.Array) -> jax.Array:
        """Which pairs of the block are its expert's."""
        return jnp.arange(self.rows) < self.size_I[i]

    def read(self, a: jax.Array, i: jax.Array) -> jax.Array:
        """The block's rows."""
        return jax.lax.dynamic_slice_in_dim(a, self.first_I[i], self.rows)

    def write(self, a: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
        """`a` with the block's rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(a, block.astype(a.dtype), self.first_I[i], 0)

    def zeros(self, *width: int, dtype: jnp.dtype) -> jax.Array:
        """An array with a row a pair."""
        return jnp.zeros((*self.pair_M.shape, *width), dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulated in float32 and back, the fastest form of a product here."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _outer(a_BK: jax.Array, b_BN: jax.Array) -> jax.Array:
    """`a^T b`. The barrier keeps the transposition apart: fused into the product it is slow."""
    a_KB = jax.lax.optimization_barrier(a_BK.T)
    return jnp.dot(a_KB, b_BN, preferred_element_type=jnp.float32)


@jax.custom_vjp
def by_blocks(
    x_ND: jax.Array, order_M: jax.Array, place_M: jax.Array, size_E: jax.Array,
    weight_NK: jax.Array, weights: Weights,
) -> jax.Array:  # fmt: skip
    """`expert_mlp` of sorted pairs, block by block."""
    return _forward(x_ND, order_M, place_M, size_E, weight_NK, weights)[0]


def _forward(x_ND, order_M, place_M, size_E, weight_NK, weights):
    gate_up_EDG, down_EFD = weights
    walk = _Blocks(order_M, size_E, weight_NK.shape[1])
    x_MD = x_ND[walk.token_M]

    def one(i, carry):
        y_MD, gate_up_MG = carry
        e = walk.expert_I[i]
        gate_up_BG = _dot(walk.read(x_MD, i), gate_up_EDG[e])
        gate_BF, up_BF = _halves(gate_up_BG)
        y_BD = _dot(jax.nn.silu(gate_BF) * up_BF, down_EFD[e])
        return walk.write(y_MD, i, y_BD), walk.write(gate_up_MG, i, gate_up_BG)

    widths = (x_ND.shape[1], gate_up_EDG.shape[2])
    start = tuple(walk.zeros(width, dtype=x_ND.dtype) for width in widths)
    y_MD, gate_up_MG = jax.lax.fori_loop(0, walk.count, one, start)
    saved = (x_ND, order_M, place_M, size_E, weight_NK, weights, gate_up_MG)
    y_NKD = y_MD[place_M].reshape(*weight_NK.shape, -1).astype(jnp.float32)
    return jnp.einsum("nkd,nk->nd", y_NKD, weight_NK).astype(y_MD.dtype), saved


def _backward(saved, dy_ND):
    x_ND, order_M, place_M, size_E, weight_NK, weights, gate_up_MG = saved
    gate_up_EDG, down_EFD = weights
    walk = _Blocks(order_M, size_E, weight_NK.shape[1])
    x_MD, dy_MD = x_ND[walk.token_M], dy_ND[walk.token_M]
    weight_M = weight_NK.reshape(-1)[walk.pair_M]

    def one(i, carry):
        dx_MD, dweight_M, dgate_up_EDG, ddown_EFD = carry
        e, own_B = walk.expert_I[i], walk.own(i)
        x_BD, dy_BD = walk.read(x_MD, i), walk.read(dy_MD, i)
        gate_BF, up_BF = _halves(walk.read(gate_up_MG, i))
        # Weight 0 for other experts' pairs keeps them out of this one's gradients.
        weight_B1 = jnp.where(own_B, walk.read(weight_M, i), 0)[:, None].astype(x_ND.dtype)

        slope_BF = jax.nn.sigmoid(gate_BF)
        silu_BF = gate_BF * slope_BF
        h_BF = silu_BF * up_BF
        dh_BF = _dot(dy_BD, down_EFD[e].T)
        dweight_B = jnp.where(own_B, (h_BF * dh_BF).astype(jnp.float32).sum(axis=1), 0)
        dh_BF *= weight_B1
        dgate_BF = dh_BF * up_BF * (slope_BF + silu_BF * (1 - slope_BF))
        dgate_up_BG = jnp.concatenate([dgate_BF, dh_BF * silu_BF], axis=1)
        return (
            walk.write(dx_MD, i, _dot(dgate_up_BG, gate_up_EDG[e].T)),
            walk.write(dweight_M, i, dweight_B),
            dgate_up_EDG.at[e].add(_outer(x_BD, dgate_up_BG)),
            ddown_EFD.at[e].add(_outer(h_BF * weight_B1, dy_BD)),
        )

    start = (
        walk.zeros(x_ND.shape[1], dtype=x_ND.dtype),
        walk.zeros(dtype=jnp.float32),
        *(jnp.zeros(w.shape, jnp.float32) for w in weights),
    )
    dx_MD, dweight_M, *dweights = jax.lax.fori_loop(0, walk.count, one, start)
    dx_NKD = dx_MD[place_M].reshape(*weight_NK.shape, -1)
    dx_ND = dx_NKD.astype(jnp.float32).sum(axis=1).astype(x_ND.dtype)
    dweight_NK = dweight_M[place_M].reshape(weight_NK.shape)
    dweights = tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True))
    return dx_ND, None, None, None, dweight_NK, dweights


by_blocks.defvjp(_forward, _backward)
