"""After clipping, the same inputs give logits of at most tau: with MLA and in plain attention."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.config import ConfigError
from k2jax.optim import clip_factor, muonclip, qk_clip
from k2jax.params.spec import ParamSpec

LAYERS, IN, HEADS, WIDTH = 3, 6, 2, 4
TAU = 2.0


def plain_attention():
    """Queries and keys of plain multi-head attention, and the largest logit of each head."""
    rng = np.random.default_rng(0)

    def spec(kind):
        return ParamSpec(
            ("moe_layers", "in", "heads", kind), (LAYERS, IN, HEADS, WIDTH), 1, "muon", kind
        )

    specs = {"q": spec("qk"), "k": spec("k"), "v": spec("value")}
    params = {n: jnp.asarray(rng.standard_normal(s.shape), "float32") for n, s in specs.items()}
    x = rng.standard_normal((5, IN)).astype(np.float32)

    def largest(params):
        q, k = (np.einsum("td,ldhc->lhtc", x, np.asarray(params[n])) for n in "qk")
        return np.einsum("lhtc,lhsc->lhts", q, k).max(axis=(2, 3)) * WIDTH**-0.5

    return specs, params, largest


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_plain_attention_is_brought_to_exactly_tau(alpha):
    specs, params, largest = plain_attention()
    before = largest(params)
    assert (before > TAU).any()
    tx = qk_clip(TAU, specs, alpha=alpha)
    zero = {n: jnp.zeros_like(w) for n, w in params.items()}
    updates, _ = tx.update(zero, tx.init(params), params, logit_max=jnp.asarray(before))
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(largest(after), np.minimum(before, TAU), rtol=1e-5)
    np.testing.assert_array_equal(after["v"], params["v"])
    for name, idle in (("q", 0.0), ("k", 1.0)):
        if alpha == idle:
            np.testing.assert_array_equal(after[name], params[name])


def test_it_clips_what_the_step_leaves_not_what_it_found():
    specs, params, largest = plain_attention()
    tx = qk_clip(TAU, specs)
    step = {n: jnp.full_like(w, 0.05) for n, w in params.items()}
    moved = optax.apply_updates(params, step)
    top = jnp.asarray(largest(moved))
    updates, _ = tx.update(step, tx.init(params), params, logit_max=top)
    found = largest(optax.apply_updates(params, updates))
    np.testing.assert_allclose(found, np.minimum(largest(moved), TAU), rtol=1e-5)


def test_negative_and_missing_maxima_clip_nothing():
    np.testing.assert_array_equal(clip_factor(jnp.asarray([-5.0, -jnp.inf, 0.0, TAU]), TAU), 1)


def test_layers_of_two_stacks_and_single_ones_find_their_rows():
    one = ParamSpec(("in", "heads", "qk"), (IN, HEADS, WIDTH), 1, "muon", "q", first_layer=1)
    two = ParamSpec(
        ("moe_layers", "in", "heads", "k"), (2, IN, HEADS, WIDTH), 1, "muon", "k", first_layer=2
    )
    specs = {"q": one, "k": two}
    params = {n: jnp.ones(s.shape) for n, s in specs.items()}
    tx = qk_clip(1.0, specs)
    zero = {n: jnp.zeros_like(w) for n, w in params.items()}
    top = jnp.asarray([[1, 1], [4, 1], [1, 16], [1, 1]], "float32")
    updates, _ = tx.update(zero, tx.init(params), params, logit_max=top)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["q"][0, :, 0], [0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(after["k"][:, 0, :, 0], [[1, 0.25], [1, 1]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, HEADS), (LAYERS, HEADS + 1), (LAYERS,)])
def test_maxima_of_another_model_are_refused(shape):
    specs, params, _ = plain_attention()
    tx = qk_clip(TAU, specs)
    with pytest.raises(ConfigError, match="at least 3 layers and 2 heads"):
        tx.update(params, tx.init(params), params, logit_max=jnp.zeros(shape))


def test_without_queries_or_specs_it_is_refused():
    with pytest.raises(ConfigError, match="finds no queries"):
        qk_clip(TAU, {"w": "adam"})
    with pytest.raises(ConfigError, match="needs specs"):
        muonclip(1e-2, tau=TAU)
