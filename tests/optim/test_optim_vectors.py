"""Numbers worked out by hand in float64: Newton-Schulz, two steps of Muon, QK-Clip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from k2jax.optim import clip_factor, muonclip, newton_schulz, qk_clip, scale_by_muon
from k2jax.params.spec import ParamSpec

G = jnp.asarray([[1, 2, 3], [4, 5, 6]], "float32")
ORTHOGONAL = [[-0.56829011, 0.05774194, 0.68377400], [0.56335470, 0.40561283, 0.24787096]]


def test_newton_schulz_of_a_small_matrix():
    found = newton_schulz(G, dtype="float32")
    np.testing.assert_allclose(found, ORTHOGONAL, atol=2e-5)
    values = np.linalg.svd(np.asarray(found), compute_uv=False)
    np.testing.assert_allclose(values, [0.92039511, 0.70002699], atol=2e-5)
    np.testing.assert_allclose(newton_schulz(G.T, dtype="float32"), found.T, atol=1e-6)


def test_newton_schulz_in_bfloat16_differs_in_the_second_or_third_digit():
    gap = jnp.abs(newton_schulz(G).astype("float32") - jnp.asarray(ORTHOGONAL)).max()
    assert 1e-4 < gap < 5e-2


def test_newton_schulz_maps_singular_values_as_its_polynomial_does():
    start = [1.0, 0.5, 0.1, 0.01, 0.001]
    s = np.array(start)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(s, [0.696436, 0.765439, 0.712120, 0.698917, 0.470544], atol=1e-6)
    # The iteration starts from the matrix over its norm.
    x = np.diag(start).astype(np.float32)
    norm = np.linalg.norm(x)
    found = np.diag(np.asarray(newton_schulz(jnp.asarray(x), dtype="float32")))
    right = np.array(start) / norm
    for _ in range(5):
        right = 3.4445 * right - 4.7750 * right**3 + 2.0315 * right**5
    np.testing.assert_allclose(found, right, atol=1e-5)


W0 = jnp.asarray([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]], "float32")
STEPS = [[[1, 2, 3], [4, 5, 6]], [[-1, 0.5, 2], [0, 1, -1]]]
W1 = [[0.10373723, -0.20000005, 0.29466267], [0.39529696, 0.49618983, -0.60051730]]
W2 = [[0.10690595, -0.19910937, 0.28823234], [0.39040402, 0.49059589, -0.59876915]]
WITHOUT_NESTEROV = [
    [0.10624217, -0.19974516, 0.28899708],
    [0.39085732, 0.49138706, -0.60043446],
]


def test_two_steps_of_muon_with_decay():
    params = {"w": W0}
    tx = muonclip(0.02, weight_decay=0.1, momentum=0.95, ns_dtype="float32")
    state = tx.init(params)
    for grad, right in zip(STEPS, (W1, W2), strict=True):
        updates, state = tx.update({"w": jnp.asarray(grad, "float32")}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], right, atol=1e-6)
    assert np.abs(np.asarray(params["w"]) - WITHOUT_NESTEROV).max() > 5e-4


def test_momentum_is_the_sum_form():
    spec = ParamSpec(("rows", "columns"), (2, 3), 1, "muon", "w")
    tx = scale_by_muon({"w": spec}, dtype="float32")
    state = tx.init({"w": W0})
    for grad in STEPS:
        _, state = tx.update({"w": jnp.asarray(grad, "float32")}, state)
    momentum = jax.tree.leaves(state)[0]
    nesterov = np.asarray(STEPS[1]) + 0.95 * np.asarray(momentum)
    np.testing.assert_allclose(
        nesterov, [[-1.0475, 2.78, 6.6075], [3.61, 6.4625, 3.465]], atol=1e-5
    )


def test_qk_clip_of_a_head_at_250_brings_it_to_100():
    nope, rope, value, heads = 3, 2, 4, 2
    axes = ("moe_layers", "rank", "heads")
    specs = {
        "q": ParamSpec((*axes, "qk"), (1, 5, heads, nope + rope), 1, "muon", "q"),
        "kv": ParamSpec((*axes, "kv"), (1, 5, heads, nope + value), 1, "muon", "kv"),
    }
    np.testing.assert_allclose(clip_factor(jnp.asarray(250.0), 100.0), 0.4, rtol=1e-7)
    params = {name: jnp.ones(spec.shape) for name, spec in specs.items()}
    tx = qk_clip(100.0, specs, nope=nope)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params, logit_max=jnp.asarray([[99.0, 250.0]]))
    q, kv = (np.asarray(optax.apply_updates(params, updates)[name]) for name in ("q", "kv"))
    root = 0.6324555320
    np.testing.assert_array_equal(q[:, :, 0], 1)
    np.testing.assert_array_equal(kv[:, :, 0], 1)
    np.testing.assert_allclose(q[0, 0, 1], [root] * nope + [0.4] * rope, rtol=1e-6)
    np.testing.assert_allclose(kv[0, 0, 1], [root] * nope + [1.0] * value, rtol=1e-6)
    np.testing.assert_allclose(250 * q[0, 0, 1, 0] * kv[0, 0, 1, 0], 100, rtol=1e-6)
    np.testing.assert_allclose(250 * q[0, 0, 1, -1], 100, rtol=1e-6)  # the shared key stays
