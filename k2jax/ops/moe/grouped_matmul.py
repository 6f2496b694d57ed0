"""Products of sorted rows with the matrix of their group."""

import functools

import jax

from k2jax.ops.moe import grouped_matmul_gpu as gpu

# Rows, inputs and outputs that TPUs multiply at a time: what fits the 16 MiB of fast memory that
# the compiler grants a kernel.
TILES = (512, 1024, 1024)


@jax.custom_vjp
def grouped(x_MK: jax.Array, w_EKN: jax.Array, size_E: jax.Array) -> jax.Array:
    """Each row times the matrix of its group.

    Args:
        x_MK: rows, those of group 0 first.
        w_EKN: a matrix for each group.
        size_E: int32, rows of each group. What comes after the last one is not to be used.

    Its gradient is written out: a TPU's own for the matrices multiplies all rows once a group, so
    there a kernel of JAX's (megablox) takes its place. GPUs have kernels of our own. Where there is
    neither, XLA masks, which is right and slow.
    """
    return _product(x_MK, w_EKN, size_E)


def _product(x_M: jax.Array, w_EKN: jax.Array, size_E: jax.Array, transposed: bool = False):
    """Each row times its group's matrix, or the transpose of it."""
    turned = lambda w_EKN: w_EKN.swapaxes(1, 2) if transposed else w_EKN
    by = {"default": lambda x_M, w_EKN, size_E: jax.lax.ragged_dot(x_M, turned(w_EKN), size_E)}
    if gpu.usable(*w_EKN.shape[1:]):
        by["cuda"] = functools.partial(gpu.grouped_by_tiles, transposed=transposed)
    return jax.lax.platform_dependent(x_M, w_EKN, size_E, **by)


def summed(x_MK: jax.Array, dy_MN: jax.Array, size_E: jax.Array) -> jax.Array:
    """`x^T dy` of each group, the gradient of the matrices; by masks."""
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return jax.lax.ragged_dot_general(x_MK, dy_MN, size_E, dims)


def summed_by_tiles(
    x_MK: jax.Array, dy_MN: jax.Array, size_E: jax.Array, tiles=TILES, interpret: bool = False
) -> jax.Array:
    """`summed` by a TPU kernel; the rows must be a multiple of the first tile."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    dims = zip(tiles, (x_MK.shape[0], x_MK.shape[1], dy_MN.shape[1]), strict=True)
    tiling = tuple(min(pair) for pair in dims)
    return tgmm(x_MK.T, dy_MN, size_E, x_MK.dtype, tiling, interpret=interpret)


def _forward(x_MK, w_EKN, size_E):
    return grouped(x_MK, w_EKN, size_E), (x_MK, w_EKN, size_E)


def _backward(saved, dy_MN):
    x_MK, w_EKN, size_E = saved
    dx_MK = _product(dy_MN, w_EKN, size_E, transposed=True)
    by = {"default": summed}
    if gpu.usable(*w_EKN.shape[1:]):
        by["cuda"] = gpu.summed_by_tiles
    if x_MK.shape[0] % TILES[0] == 0:
        by["tpu"] = summed_by_tiles
    dw_EKN = jax.lax.platform_dependent(x_MK, dy_MN, size_E, **by)
    return dx_MK, dw_EKN.astype(w_EKN.dtype), None


grouped.defvjp(_forward, _backward)
