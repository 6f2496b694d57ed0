"""Counts and FLOPs are the specification's, to the last digit (sections 1.9 and 1.10)."""

import math

import pytest

from k2jax import configs
from k2jax.commands.describe import describe


def test_kimi_k2_counts():
    counts = describe(configs.load("kimi_k2"))["counts"]
    assert counts == {
        "total_parameters": 1_026_408_232_448,
        "active_matmul_parameters": 30_511_661_056,
        "active_matmul_parameters_with_head": 31_686_066_176,
        "active_matmul_parameters_with_head_and_embedding": 32_860_471_296,
        "active_parameters": 30_512_690_688,
        "active_parameters_with_head": 31_687_095_808,
        "active_parameters_with_head_and_embedding": 32_861_500_928,
        "mtp_parameters": 0,
        "mtp_active_matmul_parameters": 0,
    }


@pytest.mark.parametrize("name", ["kimi_k2_0905", "kimi_k2_thinking", "kimi_k2_5"])
def test_later_releases_have_the_same_counts(name):
    assert describe(configs.load(name))["counts"] == describe(configs.load("kimi_k2"))["counts"]


def test_kimi_k2_flops():
    flops = describe(configs.load("kimi_k2"))["flops"]
    assert flops["matmul_flops_per_token"] == 63_372_132_352
    assert flops["attention_flops_per_token_per_key"] == 2_498_560
    assert flops["absorbed_attention_flops_per_token_per_key"] == 2 * 61 * 64 * (576 + 512)
    assert round(flops["forward_flops_per_token"] / 1e9, 2) == 68.49
    assert round(flops["forward_flops_per_token_full_context"] / 1e9, 1) == 73.6
    assert round(flops["train_flops_per_token"] / 1e9, 1) == 205.5


def test_moonlight_and_deepseek_counts():
    moonlight = describe(configs.load("moonlight_16b_a3b"))["counts"]
    tables = 2 * 163_840 * 2_048
    assert moonlight["total_parameters"] == 15_960_110_208
    assert moonlight["total_parameters"] - tables == 15_289_021_568
    assert moonlight["active_parameters"] == 2_243_687_552
    deepseek = describe(configs.load("deepseek_v3"))["counts"]
    assert deepseek["total_parameters"] == 671_026_419_200
    assert round(deepseek["active_parameters_with_head"] / 1e9, 2) == 36.63
    assert round(deepseek["active_matmul_parameters_with_head"] / 1e9, 2) == 36.62


def test_deepseeks_mtp_layer_is_counted_by_itself():
    """11.61B of its own (spec 1.8): a layer as the others, `eh_proj` and three norms."""
    found = describe(configs.load("deepseek_v3"))
    leaves = {leaf["name"]: math.prod(leaf["shape"]) for leaf in found["parameters"]}
    one = sum(size for name, size in leaves.items() if name.startswith("layers.")) // 58
    own = 2 * 7_168 * 7_168 + 3 * 7_168
    assert found["counts"]["mtp_parameters"] == one + own
    assert round((one + own) / 1e9, 2) == 11.61
    flops = found["flops"]
    both = flops["forward_flops_per_token"] + flops["mtp_flops_per_token"]
    assert flops["train_flops_per_token"] == 3 * both
    layer = flops["forward_flops_per_token"] / 61  # about one layer, and a head
    assert layer < flops["mtp_flops_per_token"] < 4 * layer


def test_one_mixture_layer_of_kimi_k2():
    """17,059,365,248 parameters a layer, as spec 1.9 has it."""
    leaves = describe(configs.load("kimi_k2"))["parameters"]
    total = 0
    for leaf in leaves:
        if leaf["name"].startswith("layers."):
            size = 1
            for n in leaf["shape"]:
                size *= n
            total += size
    assert total == 60 * 17_059_365_248


def test_every_parameter_names_its_published_tensor():
    leaves = {leaf["name"]: leaf for leaf in describe(configs.load("kimi_k2"))["parameters"]}
    assert leaves["layers.moe.experts.gate"] == {
        "name": "layers.moe.experts.gate",
        "shape": [60, 384, 7168, 2048],
        "layout": "P(None, 'expert', ('data', 'context'), 'model')",
        "group": "muon",
        "published": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
    }
