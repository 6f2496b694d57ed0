"""Products of groups of rows: every kernel gives what a loop over groups gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.moe import grouped_gpu as gpu
from k2jax.ops.moe import grouped_matmul
from k2jax.ops.moe import grouped_tpu as tpu
from k2jax.ops.moe.grouped import grouped_outer

pytestmark = pytest.mark.device

M, K, N = 64, 128, 256
SIZES = [(20, 0, 17, 27), (64, 0, 0, 0), (3, 5, 0, 8), (0, 0, 0, 0)]
PRODUCTS = {
    "xla": grouped_matmul,
    "gpu kernel": functools.partial(gpu.grouped_matmul, rows=16, interpret=True),
    "gpu kernel, transposed": lambda x, w, size: gpu.grouped_matmul(
        x, w.swapaxes(1, 2), size, transposed=True, rows=16, interpret=True
    ),
}
SUMS = {
    "masked": grouped_outer,
    "tpu kernel": functools.partial(tpu.grouped_outer, tiles=(16, 128, 128), interpret=True),
    "gpu kernel": functools.partial(gpu.grouped_outer, interpret=True),
}


def drawn(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def by_group(sizes):
    """Slices of the rows of each group."""
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def wide(a):
    return np.asarray(a, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_is_multiplied_by_the_matrix_of_its_group(kernel, sizes, dtype):
    x, w = drawn((M, K), (len(sizes), K, N), dtype=dtype)
    ours = PRODUCTS[kernel](x, w, jnp.asarray(sizes, jnp.int32))
    right = np.zeros((M, N))  # rows of no group give 0
    for e, rows in enumerate(by_group(sizes)):
        right[rows] = wide(x[rows]) @ wide(w[e])
    # bfloat16: one rounding of the result, 2^-9 of values up to 50.
    np.testing.assert_allclose(wide(ours), right, atol=3e-5 if dtype == "float32" else 0.15)


@pytest.mark.parametrize("kernel", SUMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matrices_are_summed_over_the_rows_of_their_group(kernel, sizes):
    x, dy = drawn((M, K), (M, N))
    ours = SUMS[kernel](x, dy, jnp.asarray(sizes, jnp.int32))
    right = np.stack([wide(x[rows]).T @ wide(dy[rows]) for rows in by_group(sizes)])
    np.testing.assert_allclose(ours, right, atol=2e-5)


def test_gpus_before_ampere_and_odd_widths_get_no_kernel(monkeypatch):
    assert gpu.is_supported(7168, 2048) and gpu.is_supported(128, 256)
    assert not gpu.is_supported(24, 256)

    class Turing:
        compute_capability = "7.5"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Turing()])
    assert not gpu.is_supported(7168, 2048)
