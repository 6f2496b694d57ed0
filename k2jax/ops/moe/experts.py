"""The chosen experts' MLPs: each token through its experts, summed by weight."""

import jax
import jax.numpy as jnp

from k2jax.ops.moe.experts_cpu import expert_mlp_by_blocks
from k2jax.ops.moe.grouped import grouped_matmul
from k2jax.ops.moe.permute import (
    permute_rows,
    permute_tokens,
    sort_by_expert,
    unpermute_and_sum,
)
from k2jax.ops.moe.weights import Weights, split_gate_up


def expert_mlp(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights
) -> jax.Array:
    """Sum over a token's experts of weight times `down(silu(gate x) * up x)`, in `x_ND`'s dtype.

    Args:
        x_ND: tokens.
        expert_NK: int32 experts of each token, each at most once; those outside of 0..E-1 are on
            another device and contribute nothing.
        weight_NK: float32.
        weights: in `x_ND`'s dtype.

    Tokens are sorted by expert; nothing is dropped or padded to a capacity. Outputs are combined in
    float32. Accelerators multiply by groups of rows, CPUs by blocks of them.
    """
    order_M, place_M, size_E, weight_NK = sort_by_expert(expert_NK, weight_NK, weights[0].shape[0])
    return jax.lax.platform_dependent(
        x_ND,
        order_M,
        place_M,
        size_E,
        weight_NK,
        weights,
        cpu=expert_mlp_by_blocks,
        default=expert_mlp_by_groups,
    )


def reference_expert_mlp(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights
) -> jax.Array:
    """Compute `expert_mlp` by running every expert on every token."""
    gate_up_EDG, down_EFD = weights
    gate_NEF, up_NEF = split_gate_up(jnp.einsum("nd,edg->neg", x_ND, gate_up_EDG))
    y_NED = jnp.einsum("nef,efd->ned", jax.nn.silu(gate_NEF) * up_NEF, down_EFD)
    chosen_NKE = expert_NK[..., None] == jnp.arange(down_EFD.shape[0])
    share_NE = jnp.where(chosen_NKE, weight_NK[..., None], 0.0).sum(axis=1)
    return jnp.einsum("ned,ne->nd", y_NED.astype(jnp.float32), share_NE).astype(x_ND.dtype)


def sorted_expert_mlp(
    x_MD: jax.Array, weight_M1: jax.Array, weights: Weights, size_E: jax.Array
) -> jax.Array:
    """Run rows through the expert of their group, times their weight.

    Args:
        x_MD: rows, those of expert 0 first.
        weight_M1: float32; 0 for rows of no expert.
        weights: as for `expert_mlp`.
        size_E: int32, rows of each expert.
    """
    rows_M = jnp.arange(x_MD.shape[0], dtype=jnp.int32)
    return jax.lax.platform_dependent(
        x_MD,
        weight_M1,
        weights,
        size_E,
        cpu=lambda x, weight, weights, size: expert_mlp_by_blocks(
            x, rows_M, rows_M, size, weight, weights
        ),
        default=sorted_expert_mlp_by_groups,
    )


def sorted_expert_mlp_by_groups(
    x_MD: jax.Array, weight_M1: jax.Array, weights: Weights, size_E: jax.Array
) -> jax.Array:
    """Compute `sorted_expert_mlp` by grouped products.

    The weight is applied between them, where rows are narrow, and so that its gradient does not
    need the output.
    """
    gate_up_EDG, down_EFD = weights
    gate_MF, up_MF = split_gate_up(grouped_matmul(x_MD, gate_up_EDG, size_E))
    h_MF = (jax.nn.silu(gate_MF) * up_MF).astype(jnp.float32) * weight_M1
    return grouped_matmul(h_MF.astype(x_MD.dtype), down_EFD, size_E)


def expert_mlp_by_groups(
    x_ND: jax.Array,
    order_M: jax.Array,
    place_M: jax.Array,
    size_E: jax.Array,
    weight_NK: jax.Array,
    weights: Weights,
) -> jax.Array:
    """Compute `expert_mlp` of sorted pairs by grouped products."""
    x_MD = permute_tokens(x_ND, order_M, place_M)
    weight_M1 = permute_rows(weight_NK.reshape(-1, 1), order_M, place_M)
    y_MD = sorted_expert_mlp_by_groups(x_MD, weight_M1, weights, size_E)
    return unpermute_and_sum(y_MD, order_M, place_M, x_ND.shape[0])
