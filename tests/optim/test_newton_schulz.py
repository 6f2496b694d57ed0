"""The cheaper iteration and other polynomials, beside the standard one."""

import jax
import numpy as np
import pytest

from k2jax.optim import newton_schulz, scale_by_muon
from k2jax.optim.newton_schulz import RESTARTS, schedule
from k2jax.params.route import newton_schulz_flops

SHAPE = (64, 160)


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    random = rng.standard_normal(SHAPE)
    u, _, v = np.linalg.svd(random, full_matrices=False)
    low = rng.standard_normal((SHAPE[0], 4)) @ rng.standard_normal((4, SHAPE[1]))
    return {
        "random": random,
        "low rank": low,
        "rank one": low[:, :1] * low[:1],
        "ill-conditioned": u * np.logspace(0, -6, len(u)) @ v,
        "zero": np.zeros(SHAPE),
    }


@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # Errors of R, 6e-8 of the largest singular value, grow by 12 (the polynomial's slope at 0,
        # squared) each step up to a restart and by 3.4 after it.
        ("float32", 2e-4),
        # The standard iteration in bfloat16 is itself up to 0.5 from float32 on these.
        ("bfloat16", 0.2),
    ],
)
def test_gram_iteration_agrees_with_the_standard_one(kind, turned, dtype, tolerance):
    x = matrices()[kind].astype(np.float32)
    x = x.T if turned else x
    right = np.asarray(newton_schulz(x, dtype=dtype))
    found = np.asarray(newton_schulz(x, dtype=dtype, gram=RESTARTS))
    assert np.linalg.norm(found - right, 2) <= tolerance


def test_without_a_restart_bfloat16_is_lost_and_float32_is_not():
    x = matrices()["low rank"].astype(np.float32)

    def gap(dtype):
        return np.linalg.norm(
            newton_schulz(x, dtype=dtype, gram=()) - newton_schulz(x, dtype=dtype), 2
        )

    assert gap("bfloat16") > 1
    assert gap("float32") < 1e-2


def test_gram_iteration_of_a_stack_is_that_of_its_matrices():
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 20), np.float32)
    found = newton_schulz(x, dtype="float32", gram=RESTARTS)
    for index in np.ndindex(2, 3):
        one = newton_schulz(x[index], dtype="float32", gram=RESTARTS)
        np.testing.assert_allclose(found[index], one, atol=2e-5)  # 12^3 times rounding


@pytest.mark.parametrize("small, left_out", [(256, 1 / 4), (512, 3 / 8)])
def test_blocks_of_symmetric_products_leave_out_up_to_three_eighths(small, left_out):
    x = jax.ShapeDtypeStruct((small, 1024), "float32")

    def cost(gram):
        return (
            jax.jit(lambda x: newton_schulz(x, dtype="float32", gram=gram))
            .lower(x)
            .cost_analysis()["flops"]
        )

    a, b = x.shape
    dense = 8 * a * a * b + 28 * a**3
    # Fourteen of the products are of the small side alone; two of the others are symmetric too.
    symmetric = 28 * a**3 + 4 * a * a * b
    assert cost(RESTARTS) == pytest.approx(dense - left_out * symmetric, rel=0.01)
    assert cost(RESTARTS) < 0.62 * newton_schulz_flops(*x.shape)


def test_polar_express_brings_small_singular_values_to_one():
    start = np.logspace(-3, 0, 32)
    u, _, v = np.linalg.svd(np.random.default_rng(1).standard_normal((32, 48)), full_matrices=False)
    x = (u * start @ v).astype(np.float32)
    found = newton_schulz(x, 8, "float32", polynomial="polar_express")
    norm = np.linalg.norm(start)
    values = start / norm
    for a, b, c in schedule("polar_express", 8):
        values = a * values + b * values**3 + c * values**5
    np.testing.assert_allclose(
        np.linalg.svd(found, compute_uv=False), np.sort(values)[::-1], atol=1e-4
    )  # the first steps multiply rounding errors by up to 8 each
    assert values.min() > 0.99
    assert values.max() < 1.01


def test_own_coefficients_are_a_schedule_whose_last_step_repeats():
    x = matrices()["random"].astype(np.float32)
    cubic = [(1.5, -0.5, 0.0)]
    found = newton_schulz(x, 20, "float32", polynomial=cubic)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(found, u @ v, atol=1e-5)


def test_unknown_polynomials_and_no_steps_are_refused():
    with pytest.raises(ValueError, match="did you mean 'polar_express'"):
        newton_schulz(np.ones((2, 2)), polynomial="polar_expres")
    with pytest.raises(ValueError, match="at least one step"):
        newton_schulz(np.ones((2, 2)), steps=0)
    with pytest.raises(ValueError, match=r"\(a, b, c\) of each step"):
        newton_schulz(np.ones((2, 2)), polynomial=(3.0, -4.0, 2.0))
    with pytest.raises(ValueError, match=r"rows, columns\], not an array of \(4,\)"):
        newton_schulz(np.ones(4))
    with pytest.raises(ValueError, match=r"restart before, as \(3,\), not 3"):
        newton_schulz(np.ones((2, 2)), gram=3)


@pytest.mark.parametrize("gram", [None, RESTARTS])
def test_scale_by_muon_takes_the_iteration_it_is_told(gram):
    x = {"w": matrices()["random"].astype(np.float32)}
    tx = scale_by_muon(dtype="float32", polynomial="polar_express", gram=gram)
    found, _ = tx.update(x, tx.init(x))
    scaled = x["w"] * 1.95  # momentum does not change the direction of a first step
    right = newton_schulz(scaled, dtype="float32", polynomial="polar_express", gram=gram)
    np.testing.assert_allclose(found["w"], 0.2 * 160**0.5 * right, atol=1e-5)


def test_a_transposed_bfloat16_matrix_takes_the_gram_iteration_on_a_cpu():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    found = jax.jit(lambda x: newton_schulz(x.T[None], gram=RESTARTS))(x)
    np.testing.assert_allclose(found[0], newton_schulz(x.T, gram=RESTARTS), atol=1e-2)  # bfloat16
