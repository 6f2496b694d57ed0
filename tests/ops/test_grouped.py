"""One test for every implementation of the grouped matmul."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.grouped import block_dot, gather_rows, grouped_dot, reference_dot

DOTS = {
    "block": block_dot,
    "ragged": jax.lax.ragged_dot,
    "reference": reference_dot,
    "chosen": grouped_dot,
}
K, N = 5, 7
SIZES = {  # rows: sizes of the groups; few rows have blocks of 8, many have blocks of 32
    37: {
        "random": (9, 3, 14, 11),
        "empty": (0, 20, 0, 17),
        "one": (0, 0, 37, 0),
        "beyond": (5, 0, 8, 1),
        "nothing": (0, 0, 0, 0),
    },
    300: {"random": (130, 1, 97, 72), "beyond": (0, 33, 0, 150)},
}
CASES = [(rows, case) for rows, sizes in SIZES.items() for case in sizes]


def drawn(rows, dtype):
    rng = np.random.default_rng(rows)
    cast = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return cast(rows, K), cast(4, K, N), cast(rows, N)


@functools.cache
def compiled(name):
    @jax.jit
    def both(x, w, size, dy):
        y, back = jax.vjp(lambda x, w: DOTS[name](x, w, size), x, w)
        return y, *back(dy)

    return both


def expected(x, w, size, dy):
    """Value and gradients in float64, group by group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw, first = np.zeros((len(x), N)), np.zeros_like(x), np.zeros_like(w), 0
    for g, n in enumerate(size):
        own = slice(first, first + n)
        y[own], dx[own], dw[g] = x[own] @ w[g], dy[own] @ w[g].T, x[own].T @ dy[own]
        first += n
    return y, dx, dw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize(("rows", "case"), CASES)
def test_values_and_gradients_are_those_of_a_loop_over_groups(name, rows, case, dtype):
    size = SIZES[rows][case]
    x, w, dy = drawn(rows, dtype)
    results = compiled(name)(x, w, jnp.asarray(size, "int32"), dy)
    # bfloat16 is rounded once or a few times (2^-9), sums are longer in the weights' gradient.
    tolerance = 2e-6 if dtype == "float32" else 1e-2
    for result, right in zip(results, expected(x, w, size, dy), strict=True):
        assert result.dtype == dtype
        scale = max(np.abs(right).max(), 1.0)
        assert np.abs(np.asarray(result, np.float64) - right).max() <= tolerance * scale


def test_rows_beyond_the_groups_stay_out_even_where_they_are_not_finite():
    size = (5, 0, 8, 1)
    x, w, dy = drawn(37, "float32")
    x = x.at[sum(size) :].set(jnp.nan)
    y, _, dw = compiled("block")(x, w, jnp.asarray(size, "int32"), dy)
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(dw).all()


@pytest.mark.parametrize("copies", [1, 3])
def test_gathered_rows_and_their_gradient_are_those_of_indexing(copies):
    rng = np.random.default_rng(copies)
    x = jnp.asarray(rng.standard_normal((6, 4)), "float32")
    dy = jnp.asarray(rng.standard_normal((6 * copies, 4)), "float32")
    order = jnp.asarray(rng.permutation(6 * copies), "int32")
    y, back = jax.vjp(lambda x: gather_rows(x, order, jnp.argsort(order), copies), x)
    right, right_back = jax.vjp(lambda x: x[order // copies], x)
    np.testing.assert_array_equal(y, right)
    np.testing.assert_allclose(back(dy)[0], right_back(dy)[0], rtol=1e-6)
