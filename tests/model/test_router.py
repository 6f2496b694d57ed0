"""The router against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import ModelConfig
from k2jax.model.moe import router_logits
from k2jax.model.projection import Policy
from k2jax.model.router import Choices, count_choices, count_differences, route
from k2jax.params.arrays import bind
from k2jax.params.kimi import Moe

PLAIN = ModelConfig(embed=13, experts=12, experts_per_token=4, routed_scale=2.827)
GROUPED = dataclasses.replace(PLAIN, groups=4, groups_per_token=2, routed_scale=2.5)


def drawn(seed, cfg, low=0.0):
    rng = np.random.default_rng(seed)

    def cast(*shape):
        return jnp.asarray(rng.standard_normal(shape), "float32")

    bias = jnp.asarray(rng.uniform(low, low + 0.5, cfg.experts), "float32")
    return cast(50, cfg.embed), cast(cfg.embed, cfg.experts), bias


def routed(x, w, bias, cfg):
    """Through the layer's own product."""
    rest = dict.fromkeys(("experts.gate", "experts.up", "experts.down"), 0)
    moe = Moe(dataclasses.replace(cfg, shared_experts=0), "")
    logits = router_logits(
        bind(moe, {"router": w, "bias": bias} | rest), x[None], Policy("float32")
    )
    return route(logits[0], bias, cfg)


def test_replayed_experts_are_weighed_by_the_scores_of_this_pass():
    cfg = ModelConfig(experts=4, experts_per_token=2, routed_scale=2.0)
    logits, bias = jnp.asarray([[0.0, 3.0, 1.0, -1.0]] * 2), jnp.zeros(4)
    theirs = jnp.asarray([[0, 3], [-1, -1]])
    routing = route(logits, bias, cfg, Choices(theirs, True))
    np.testing.assert_array_equal(routing.expert_NK, [[0, 3], [1, 2]])
    score = 1 / (1 + np.exp(-np.array([0.0, -1.0])))
    np.testing.assert_allclose(routing.weight_NK[0], 2 * score / score.sum(), rtol=1e-6)
    own = route(logits, bias, cfg).expert_NK
    valid = jnp.asarray([True, True])
    assert count_differences(own, Choices(theirs, False), valid) == (2.0, 2.0)
    assert count_differences(own, Choices(own[:, ::-1], False), valid) == (0.0, 4.0)
    assert count_differences(own, Choices(theirs, False), ~valid) == (0.0, 0.0)


def expected(x, w, bias, cfg):
    """Choices, best first, and their weights: spec 1.7, one token at a time."""
    score = 1 / (1 + np.exp(-(np.float64(x) @ np.float64(w))))
    choices, weights = [], []
    for s in score:
        c = s + np.float64(bias)
        group = c.reshape(cfg.groups, -1)
        worth = np.sort(group)[:, -2:].sum(axis=1)
        kept = np.argsort(-worth)[: cfg.groups_per_token]
        c = np.where(np.isin(np.arange(cfg.groups), kept)[:, None], group, -np.inf).ravel()
        best = np.argsort(-c)[: cfg.experts_per_token]
        choices.append(best)
        weights.append(s[best] / s[best].sum() * cfg.routed_scale)
    return np.stack(choices), np.stack(weights)


@pytest.mark.parametrize("cfg", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("low", [0.0, -2.0], ids=["positive", "negative"])
def test_choices_and_weights_are_those_of_the_published_code(cfg, low):
    inputs = drawn(1, cfg, low)
    routing = routed(*inputs, cfg)
    choice, weight = expected(*inputs, cfg)
    np.testing.assert_array_equal(routing.expert_NK, choice)
    np.testing.assert_allclose(routing.weight_NK, weight, rtol=1e-5)
    np.testing.assert_allclose(routing.weight_NK.sum(axis=1), cfg.routed_scale, rtol=1e-6)


def test_a_token_chooses_within_its_groups_only():
    routing = routed(*drawn(2, GROUPED), GROUPED)
    groups = np.asarray(routing.expert_NK) // (GROUPED.experts // GROUPED.groups)
    assert max(len(set(row)) for row in groups.tolist()) == GROUPED.groups_per_token


def test_bias_changes_the_choice_and_nothing_else():
    x, w, bias = drawn(3, PLAIN)
    biased, free = routed(x, w, bias, PLAIN), routed(x, w, 0 * bias, PLAIN)
    np.testing.assert_array_equal(biased.score_NE, free.score_NE)
    same = np.sort(biased.expert_NK) == np.sort(free.expert_NK)
    kept = same.all(axis=1)
    assert 0 < kept.sum() < len(kept)  # the bias matters for some tokens, not for all
    np.testing.assert_allclose(
        np.sort(biased.weight_NK[kept]), np.sort(free.weight_NK[kept]), rtol=1e-6
    )


def test_product_is_float32_for_bfloat16_activations():
    x, w, bias = drawn(4, PLAIN)
    narrow = x.astype("bfloat16")
    routing = routed(narrow, w, bias, PLAIN)
    wide = routed(narrow.astype("float32"), w, bias, PLAIN)
    assert routing.weight_NK.dtype == routing.score_NE.dtype == jnp.float32
    np.testing.assert_array_equal(routing.score_NE, wide.score_NE)


def test_gradient_reaches_the_router_through_the_weights_and_never_the_bias():
    x, w, bias = drawn(5, PLAIN)

    def mixed(w, bias):
        return (routed(x, w, bias, PLAIN).weight_NK ** 2).sum()

    dw, dbias = jax.grad(mixed, argnums=(0, 1))(w, bias)
    assert jnp.abs(dw).max() > 0
    assert jnp.abs(dbias).max() == 0


def test_scores_of_zero_give_weights_of_zero_not_nan():
    x, w, bias = drawn(6, PLAIN)
    routing = routed(0 * x + 1, 0 * w - 1e4, bias, PLAIN)
    np.testing.assert_array_equal(routing.weight_NK, 0.0)


def test_counts_are_choices_of_tokens_that_are_not_padding():
    rng = np.random.default_rng(7)
    choice, valid = rng.integers(0, 6, (40, 3)), rng.random(40) < 0.7
    right = np.bincount(choice[valid].ravel(), minlength=6)
    np.testing.assert_array_equal(count_choices(jnp.asarray(choice), jnp.asarray(valid), 6), right)
