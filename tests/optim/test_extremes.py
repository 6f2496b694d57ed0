"""Numbers at the edges of float32: updates are right or refused, never silently none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.optim import muonclip, newton_schulz

X = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)


@pytest.mark.parametrize("exponent", [50, 60, 64, 100, 124])
@pytest.mark.parametrize("gram", [None, (3,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_a_huge_matrix_does_not_change_its_orthogonal_one(exponent, gram, dtype):
    usual = np.asarray(newton_schulz(X, dtype=dtype, gram=gram))
    huge = np.asarray(newton_schulz(X * np.float32(2.0**exponent), dtype=dtype, gram=gram))
    np.testing.assert_allclose(huge, usual, atol=1e-5 if dtype == "float32" else 0.01)


def test_usual_matrices_are_not_touched():
    """To the bit: those whose squares have a sum are multiplied by exactly 1."""
    x = jnp.asarray(X) * 2.0**40
    plain = x / (jnp.sqrt(jnp.sum(x * x)) + 1e-7)
    one = newton_schulz(x, 1, "float32", polynomial=[(1.0, 0.0, 0.0)])
    np.testing.assert_array_equal(np.asarray(one), np.asarray(plain))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_stays_visible(value):
    x = X.copy()
    x[3, 4] = value
    assert not np.isfinite(np.asarray(newton_schulz(x))).all()


@pytest.mark.parametrize("size", [1e10, 1e18, 1e19, 1e30])
def test_a_huge_gradient_moves_every_matrix(size):
    tx = muonclip(1.0, weight_decay=0.0, ns_dtype="float32")
    params = {"m": jnp.zeros((24, 40))}
    updates, state = tx.update({"m": jnp.asarray(X) * size}, tx.init(params), params)
    assert 0.1 < float(jnp.sqrt(jnp.mean(updates["m"] ** 2))) < 0.3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: muonclip(1e-50), "learning_rate is 1e-50; it would be 0 in float32"),
        (lambda: muonclip(1e39), "learning_rate is 1e[+]39; it would be infinite"),
        (lambda: muonclip(1e-3, weight_decay=1e-39), "weight_decay is 1e-39"),
        (lambda: muonclip(1e-3, adam={"eps": 1e-30}), "adam eps is 1e-30"),
        (lambda: muonclip(1e-3, adam={"eps": 0.0}), "adam eps is 0.0"),
    ],
)
def test_a_number_that_float32_makes_none_is_refused(make, named):
    with pytest.raises(ConfigError, match=named):
        make()
