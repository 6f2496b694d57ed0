"""Order the tokens' rows by expert, and put the results back."""

import functools

import jax
import jax.numpy as jnp


def sort_by_expert(expert_NK: jax.Array, weight_NK: jax.Array, experts: int):
    """Sort the (token, choice) pairs by expert.

    Returns:
        Their order, its inverse, the pairs of each expert, and the weights: 0 for pairs whose
        expert is on another device.
    """
    expert_M = expert_NK.reshape(-1)
    local_M = (expert_M >= 0) & (expert_M < experts)
    order_M = jnp.argsort(jnp.where(local_M, expert_M, experts))  # those of other devices last
    # The inverse by a scatter: half the time of a second sort.
    rank_M = jnp.arange(order_M.size, dtype=order_M.dtype)
    place_M = jnp.zeros_like(order_M).at[order_M].set(rank_M, unique_indices=True)
    size_E = (expert_M == jnp.arange(experts)[:, None]).sum(axis=1, dtype=jnp.int32)
    return order_M, place_M, size_E, jnp.where(local_M.reshape(weight_NK.shape), weight_NK, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def unpermute_and_sum(
    y_MD: jax.Array, order_M: jax.Array, place_M: jax.Array, tokens: int
) -> jax.Array:
    """Sum each token's sorted rows, in float32 and back: the opposite of `permute_tokens`.

    One choice at a time, so that rows in the order of tokens never exist all at once.
    """
    place_KN = place_M.reshape(tokens, -1).T
    y_ND = jnp.zeros((tokens, y_MD.shape[1]), jnp.float32)
    for place_N in place_KN:
        y_ND += y_MD[place_N].astype(jnp.float32)
    return y_ND.astype(y_MD.dtype)


@jax.custom_vjp
def permute_tokens(x_ND: jax.Array, order_M: jax.Array, place_M: jax.Array) -> jax.Array:
    """Copy each token's row for every sorted pair of it.

    Its gradient gathers: TPUs compile wide scatters for minutes.
    """
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
    """Reorder rows; `place_M` is the inverse order, by which the gradient is gathered."""
    return a_M1[order_M]


permute_rows.defvjp(
    lambda a_M1, order_M, place_M: (a_M1[order_M], place_M),
    lambda place_M, da_M1: (da_M1[place_M], None, None),
)
