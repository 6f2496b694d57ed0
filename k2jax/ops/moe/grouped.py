"""Products of sorted rows with the matrix of their group."""

import functools
from types import ModuleType

import jax

from k2jax.ops.moe import grouped_gpu as gpu
from k2jax.ops.moe import grouped_hopper as hopper
from k2jax.ops.moe import grouped_tpu as tpu


@jax.custom_vjp
def grouped_matmul(x_MK: jax.Array, w_EKN: jax.Array, size_E: jax.Array) -> jax.Array:
    """Multiply each row by the matrix of its group.

    Args:
        x_MK: rows, those of group 0 first.
        w_EKN: a matrix for each group.
        size_E: int32, rows of each group. Rows after the last group are undefined.

    Its gradient is written out: XLA's own for the matrices multiplies all rows once per group on
    TPUs, so a kernel of JAX's (megablox) takes its place. GPUs have kernels of our own: Mosaic
    compiles Hopper's, Triton those of Ampere and Blackwell as long as Pallas has it. Where none
    applies, XLA masks, which is correct and slow.
    """
    return _product(x_MK, w_EKN, size_E)


def _product(x_M: jax.Array, w_EKN: jax.Array, size_E: jax.Array, transposed: bool = False):
    """Multiply each row by its group's matrix, or by the transpose of it."""

    def ragged_dot(x_M, w_EKN, size_E):
        return jax.lax.ragged_dot(x_M, w_EKN.swapaxes(1, 2) if transposed else w_EKN, size_E)

    kernels = {"default": ragged_dot}
    if on_gpu := _gpu_kernels(w_EKN):
        kernels["cuda"] = functools.partial(on_gpu.grouped_matmul, transposed=transposed)
    return jax.lax.platform_dependent(x_M, w_EKN, size_E, **kernels)


def _gpu_kernels(w_EKN: jax.Array) -> ModuleType | None:
    """The kernels that a GPU gets, if any, of those that are made for it."""
    if hopper.is_supported(w_EKN.dtype, *w_EKN.shape[1:]):
        return hopper
    return gpu if gpu.is_supported(*w_EKN.shape[1:]) else None


def grouped_outer(x_MK: jax.Array, dy_MN: jax.Array, size_E: jax.Array) -> jax.Array:
    """Sum `x^T dy` of each group, the gradient of the matrices; by masks."""
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return jax.lax.ragged_dot_general(x_MK, dy_MN, size_E, dims)


def _forward(x_MK, w_EKN, size_E):
    return grouped_matmul(x_MK, w_EKN, size_E), (x_MK, w_EKN, size_E)


def _backward(saved, dy_MN):
    x_MK, w_EKN, size_E = saved
    dx_MK = _product(dy_MN, w_EKN, size_E, transposed=True)
    kernels = {"default": grouped_outer}
    if on_gpu := _gpu_kernels(w_EKN):
        kernels["cuda"] = on_gpu.grouped_outer
    if x_MK.shape[0] % tpu.TILES[0] == 0:
        kernels["tpu"] = tpu.grouped_outer
    dw_EKN = jax.lax.platform_dependent(x_MK, dy_MN, size_E, **kernels)
    return dx_MK, dw_EKN.astype(w_EKN.dtype), None


grouped_matmul.defvjp(_forward, _backward)
