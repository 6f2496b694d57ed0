"""Numbers worked out by hand in float64, digit for digit: router, rotations, softmax scales."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import configs
from k2jax.config import ModelConfig
from k2jax.model import Kimi
from k2jax.model.rope import frequencies, rotate, rotation
from k2jax.model.router import route
from k2jax.params.declare import specs

MODELS = {name: configs.load(name).model for name in configs.NAMES}


def routed(logits, bias, cfg):
    """The router's answer to given logits."""
    x = jnp.asarray([logits], "float32")
    return route(x, jnp.asarray(bias, "float32"), cfg)


def test_router_chooses_by_biased_scores_and_weighs_by_plain_ones():
    cfg = ModelConfig(embed=6, experts=6, experts_per_token=2, routed_scale=2.827)
    routing = routed([2, 0.5, -1, 1, 0, -0.5], [-0.6, 0, 0.9, 0, 0.3, 0], cfg)
    np.testing.assert_array_equal(routing.expert_NK, [[2, 4]])
    np.testing.assert_allclose(routing.weight_NK, [[0.98875854, 1.83824146]], rtol=1e-6)
    free = routed([2, 0.5, -1, 1, 0, -0.5], [0] * 6, cfg)
    np.testing.assert_array_equal(free.expert_NK, [[0, 3]])


def test_group_limited_router_takes_the_two_best_groups():
    cfg = ModelConfig(
        embed=8, experts=8, experts_per_token=3, routed_scale=2.5, groups=4, groups_per_token=2
    )
    logits, bias = [1, -1, 0.5, 0.4, 2, -3, 0.2, 0.1], [0, 0, 0.05, 0, -0.2, 0, 0, 0.3]
    routing = routed(logits, bias, cfg)
    np.testing.assert_array_equal(routing.expert_NK, [[7, 2, 3]])
    weights = [[0.75163409, 0.89120039, 0.85716552]]
    np.testing.assert_allclose(routing.weight_NK, weights, rtol=1e-6)


def test_rotation_turns_interleaved_pairs_and_puts_first_members_first():
    cfg = ModelConfig(rope=4, rope_theta=50_000.0)
    x = jnp.asarray([1, 2, 3, 4], "float32").reshape(1, 1, 1, 4)
    turned = rotate(x, rotation(jnp.full((1, 1), 3), cfg))
    right = [-1.27223251, 2.94606598, -1.83886499, 4.03988802]
    np.testing.assert_allclose(turned.ravel(), right, rtol=1e-6)


INV_FREQ = {  # at 0, 1, 19, 20, 31
    "kimi_k2": (
        1,
        0.713111084911932,
        0.0016217599081159522,
        3.6140467735726306e-05,
        8.764412911589874e-07,
    ),
    "kimi_k2_0905": (
        1,
        0.713111084911932,
        0.0016217599081159522,
        1.8070233867863153e-05,
        4.382206455794937e-07,
    ),
    "kimi_k2_5": (
        1,
        0.713111084911932,
        0.00015837499102694852,
        1.8070233867863153e-05,
        4.382206455794937e-07,
    ),
}
INV_FREQ["kimi_k2_thinking"] = INV_FREQ["kimi_k2_0905"]


@pytest.mark.parametrize("name", INV_FREQ)
def test_yarn_frequencies_of_each_release(name):
    found = frequencies(MODELS[name])[[0, 1, 19, 20, 31]]
    np.testing.assert_allclose(found, INV_FREQ[name], rtol=1e-14)


# Last channel kept, first channel divided by the factor; between them a ramp.
EFFECTS = {
    "kimi_k2": (19, 20, 32),
    "kimi_k2_0905": (19, 20, 64),
    "kimi_k2_thinking": (19, 20, 64),
    "kimi_k2_5": (8, 20, 64),
    "deepseek_v3": (10, 23, 40),
    "moonlight_16b_a3b": (31, 32, 1),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_yarn_keeps_ramps_and_divides_where_the_releases_do(name):
    cfg, (low, high, factor) = MODELS[name], EFFECTS[name]
    plain = cfg.rope_theta ** (-np.arange(0, 64, 2) / 64)
    ratio = frequencies(cfg) / plain
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-14)
    np.testing.assert_allclose(ratio[high:], 1 / factor, rtol=1e-14)
    between = ratio[low + 1 : high]
    assert ((between < 1) & (between > 1 / factor)).all()
    np.testing.assert_allclose(np.diff(ratio[low : high + 1]), (1 / factor - 1) / (high - low))


def test_yarn_ramp_of_k2_5():
    cfg = MODELS["kimi_k2_5"]
    ratio = frequencies(cfg) / cfg.rope_theta ** (-np.arange(0, 64, 2) / 64)
    right = [
        0.91797,
        0.83594,
        0.75391,
        0.67188,
        0.58984,
        0.50781,
        0.42578,
        0.34375,
        0.26172,
        0.17969,
        0.09766,
    ]
    np.testing.assert_allclose(ratio[9:20], right, atol=5e-6)


SCALES = {
    "kimi_k2": 0.1308607999629500,
    "kimi_k2_0905": 0.1446796258026892,
    "kimi_k2_thinking": 0.1446796258026892,
    "kimi_k2_5": 0.1446796258026892,
    "deepseek_v3": 0.1352337788608801,
    "moonlight_16b_a3b": 0.0721687836487032,
}


@pytest.mark.parametrize("name", SCALES)
def test_softmax_scale_of_each_release(name):
    # All digits of a float64; the last depends on the order of the products.
    np.testing.assert_allclose(MODELS[name].softmax_scale, SCALES[name], rtol=1e-15)


def test_pre_training_at_4k_has_no_yarn():
    yarn = dataclasses.replace(MODELS["kimi_k2"].yarn, factor=1.0)
    cfg = dataclasses.replace(MODELS["kimi_k2"], yarn=yarn)
    assert cfg.softmax_scale == 192**-0.5
    np.testing.assert_allclose(frequencies(cfg), 50_000.0 ** (-np.arange(0, 64, 2) / 64))


TOTALS = {
    "kimi_k2": 1_026_408_232_448,
    "moonlight_16b_a3b": 15_960_110_208,
    "deepseek_v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_counts_are_those_of_the_files(name):
    main = [leaf for n, leaf in specs(Kimi(MODELS[name])).items() if not n.startswith("mtp.")]
    assert sum(np.prod(leaf.shape, dtype=object) for leaf in main) == TOTALS[name]
