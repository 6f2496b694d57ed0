"""Grouped products on TPUs: a kernel of JAX's (megablox)."""

import jax

# Rows, inputs and outputs that are multiplied at a time: what fits the 16 MiB of fast memory that
# the compiler grants a kernel.
TILES = (512, 1024, 1024)


def grouped_outer(
    x_MK: jax.Array, dy_MN: jax.Array, size_E: jax.Array, tiles=TILES, interpret: bool = False
) -> jax.Array:
    """Sum `x^T dy` of each group; the rows must be a multiple of the first tile."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    dims = zip(tiles, (x_MK.shape[0], x_MK.shape[1], dy_MN.shape[1]), strict=True)
    tiling = tuple(min(pair) for pair in dims)
    return tgmm(x_MK.T, dy_MN, size_E, x_MK.dtype, tiling, interpret=interpret)
