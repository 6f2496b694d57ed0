"""Experts whose weights rest on their device, all layers in one stack: for inference.

A layer of the stack is never taken out of it, since that would copy its weights at every token, nor
are gate and up-projection put side by side. Each expert that any row chose is read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from k2jax.ops.lowbit import LowBit
from k2jax.ops.moe import grouped_gpu as gpu
from k2jax.ops.moe.low_bit import multiply_low_bit, take_matrix
from k2jax.ops.moe.tiles import cut_into_tiles

Stack = jax.Array | LowBit
Stacks = tuple[Stack, Stack, Stack]  # gate_LEDF, up_LEDF, down_LEFD

# Rows of one expert that CPUs multiply at a time. One number for all calls: a row has other bits in
# blocks of another size.
ROWS = 8
GPU_ROWS = 64  # of a tile; an expert has few


def resident_mlp(
    x_MD: jax.Array,
    weight_M1: jax.Array,
    stacks: Stacks,
    layer: jax.Array | int,
    size_E: jax.Array,
    hidden: tuple[str, ...] = (),
) -> jax.Array:
    """Run rows through the expert of their group, times their weight; it has no gradient.

    Args:
        x_MD: rows, those of expert 0 first. Results of rows after the last group are undefined.
        weight_M1: float32.
        stacks: weights of this device's experts in all layers, in `x_MD`'s dtype or in few bits.
        layer: int32, index into the stacks.
        size_E: int32, rows of each expert.
        hidden: mesh axes of which each device has a part of the hidden width.
    """
    return jax.lax.platform_dependent(
        x_MD,
        weight_M1,
        stacks,
        jnp.int32(layer),
        size_E,
        cpu=functools.partial(_run_blocks, hidden=hidden),
        default=functools.partial(_run_groups, hidden=hidden),
    )


def _run_groups(x_MD, weight_M1, stacks: Stacks, layer, size_E, hidden=()):
    multiply = functools.partial(multiply_by_layer, layer=layer, size_E=size_E)
    gate_MF, up_MF = (multiply(x_MD, w, layout=P(None, hidden)) for w in stacks[:2])
    h_MF = (jax.nn.silu(gate_MF) * up_MF).astype(jnp.float32) * weight_M1
    return multiply(h_MF.astype(x_MD.dtype), stacks[2], layout=P(hidden, None))


def multiply_by_layer(
    x_MK: jax.Array,
    w_LEKN: Stack,
    layer: jax.Array,
    size_E: jax.Array,
    layout: P = P(),  # noqa: B008, a constant
) -> jax.Array:
    """Multiply each row by the matrix of its group in one layer of a stack.

    Args:
        x_MK: rows.
        w_LEKN: the stack.
        layer: index into it.
        size_E: rows of each group.
        layout: of a matrix, where this device has a part of it.
    """
    experts = size_E.shape[0]
    if isinstance(w_LEKN, LowBit):
        w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w_LEKN)
        return multiply_low_bit(x_MK, w, layer * experts, size_E, layout)
    w_XKN = w_LEKN.reshape(-1, *w_LEKN.shape[2:])  # X: experts of all layers

    def ragged_dot(x_MK, w_XKN, layer, size_E):
        size_X = jnp.zeros(w_XKN.shape[0], size_E.dtype)
        size_X = jax.lax.dynamic_update_slice(size_X, size_E, (layer * experts,))
        return jax.lax.ragged_dot(x_MK, w_XKN, size_X)

    kernels = {"default": ragged_dot}
    if gpu.is_supported(*w_XKN.shape[1:]):
        kernels["cuda"] = functools.partial(_gpu_product, experts=experts)
    return jax.lax.platform_dependent(x_MK, w_XKN, layer, size_E, **kernels)


def _gpu_product(x_MK, w_XKN, layer, size_E, *, experts: int):
    return gpu.grouped_matmul(x_MK, w_XKN, size_E, first=layer * experts, rows=GPU_ROWS)


def _run_blocks(x_MD, weight_M1, stacks: Stacks, layer, size_E, hidden=()):
    """Compute `resident_mlp` by blocks; the next expert overwrites what is written in its rows.

    An expert is taken out of its stack once, in cache, for all of its blocks.
    """
    layouts = P(None, hidden), P(None, hidden), P(hidden, None)
    rows = x_MD.shape[0]
    expert_I, first_I, end_I = cut_into_tiles(size_E, rows, min(size_E.shape[0], rows))
    x_MD, weight_M1 = (jnp.pad(a, ((0, ROWS), (0, 0))) for a in (x_MD, weight_M1))

    def run_expert(i, y_MD):
        gate_DF, up_DF, down_FD = (
            take_matrix(w, (layer, expert_I[i]), layout, x_MD.dtype)
            for w, layout in zip(stacks, layouts, strict=True)
        )

        def run_block(block, y_MD):
            first = first_I[i] + block * ROWS
            x_GD, weight_G1 = (
                jax.lax.dynamic_slice_in_dim(a, first, ROWS) for a in (x_MD, weight_M1)
            )
            y_GD = (jax.nn.silu(x_GD @ gate_DF) * (x_GD @ up_DF)) @ down_FD
            y_GD = (y_GD.astype(jnp.float32) * weight_G1).astype(y_MD.dtype)
            return jax.lax.dynamic_update_slice_in_dim(y_MD, y_GD, first, axis=0)

        blocks = -(-(end_I[i] - first_I[i]) // ROWS)
        return jax.lax.fori_loop(0, blocks, run_block, y_MD)

    return jax.lax.fori_loop(0, (size_E > 0).sum(), run_expert, jnp.zeros_like(x_MD))[:-ROWS]
