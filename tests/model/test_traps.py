"""What implementations of this family are known to get wrong, one test each.

Every test also does it the wrong way, where there is one, and sees that the answer differs. The
numbers are those of the project's two lists of traps: of the architecture, and (design) of JAX.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden.read import golden

from k2jax import configs
from k2jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from k2jax.model import Kimi, Policy, attention, hidden, plain
from k2jax.model.norm import rms_norm
from k2jax.model.rope import frequencies, rotate, rotation
from k2jax.model.router import route
from k2jax.optim import clip_factor, muonclip, newton_schulz, qk_clip, scale_by_muon
from k2jax.params.arrays import bind, initial
from k2jax.params.declare import Declare, specs
from k2jax.training.step import build

MODELS = {name: configs.load(name).model for name in configs.NAMES}


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def differ(a, b, by=1e-3):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() > by


def test_trap_01_rotary_pairs_are_interleaved():
    cfg = ModelConfig(rope=8)
    q, k = np.array(drawn(1, 1, 1, 5, 8)), np.array(drawn(2, 1, 1, 5, 8))
    turn = rotation(jnp.arange(5)[None], cfg)
    angle = np.arange(5)[:, None] * frequencies(cfg)

    def products(q, k):
        return np.einsum("btp,bsp->ts", q[:, 0], k[:, 0])

    def pairs(x):  # consecutive channels as complex numbers [DSV3 model.py]
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    def halves(x):  # half-rotation without de-interleaving: wrong
        a, b = np.split(x, 2, axis=-1)
        z = (a + 1j * b) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=-1)

    ours = products(np.asarray(rotate(q, turn)), np.asarray(rotate(k, turn)))
    np.testing.assert_allclose(ours, products(pairs(q), pairs(k)), atol=1e-5)
    assert differ(ours, products(halves(q), halves(k)))


def test_trap_02_softmax_scale_has_mscale_squared_and_cos_and_sin_have_none():
    for name, squared in (("kimi_k2", 1.8132604340), ("kimi_k2_0905", 2.0047397017)):
        scale = MODELS[name].softmax_scale
        np.testing.assert_allclose(scale * 192**0.5, squared, rtol=1e-10)
        turn = rotation(jnp.zeros((1, 1), "int32"), MODELS[name])
        np.testing.assert_array_equal(turn.cos, 1.0)
        np.testing.assert_array_equal(turn.sin, 0.0)
    assert differ(MODELS["kimi_k2"].softmax_scale, MODELS["kimi_k2_0905"].softmax_scale)


def test_trap_03_beta_fast_is_1_until_k2_5():
    thinking = MODELS["kimi_k2_thinking"]
    wrong = dataclasses.replace(thinking, yarn=dataclasses.replace(thinking.yarn, beta_fast=32.0))
    unlike = ~np.isclose(frequencies(thinking), frequencies(wrong), rtol=1e-9, atol=0)
    np.testing.assert_array_equal(np.flatnonzero(unlike), np.arange(9, 20))
    np.testing.assert_array_equal(frequencies(wrong), frequencies(MODELS["kimi_k2_5"]))


def test_trap_04_inner_norms_have_epsilon_1e_6_whatever_the_config_says():
    gold = golden("moonlight")
    assert gold.cfg.norm_eps == 1e-5
    w = bind(
        Kimi(gold.cfg),
        {n: jnp.asarray(p[0] if n.startswith("dense.") else p) for n, p in gold.params().items()},
    )
    x = 0.01 * drawn(4, 1, 3, gold.cfg.embed)
    turn = rotation(jnp.arange(3)[None], gold.cfg)
    ours, _ = attention.project_latents(w.dense.attention, x, turn, gold.cfg, Policy("float32"))

    def latent(eps):
        c = np.asarray(x) @ gold.params()["dense.attention.kv_down"][0]
        c = c[..., : gold.cfg.kv_rank]
        c = c / np.sqrt((c**2).mean(axis=-1, keepdims=True) + eps)
        return c * gold.params()["dense.attention.kv_norm"][0]

    np.testing.assert_allclose(ours, latent(1e-6), atol=1e-5)
    assert differ(ours, latent(1e-5), by=1e-2)


class Norm:
    def __init__(self):
        self.gain = Declare(ModelConfig(embed=64))("gain", 0, "norm")


def test_trap_05_norm_is_cast_before_it_is_multiplied_by_the_gain():
    x, gain = drawn(5, 4, 64).astype("bfloat16"), drawn(6, 64).astype("bfloat16")
    wide = x.astype("float32")
    unit = wide * jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6)
    leaf = bind(Norm(), {"gain": gain}).gain
    ours = rms_norm(x, leaf, 1e-6, Policy("bfloat16"))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, unit.astype("bfloat16") * gain)
    assert differ(ours, (unit * gain).astype("bfloat16"))


BIASED = ModelConfig(embed=16, experts=16, experts_per_token=2)


def test_trap_06_router_bias_stays_float32():
    leaves = specs(Kimi(MODELS["kimi_k2"]))
    assert [n for n, leaf in leaves.items() if leaf.dtype == "float32"] == ["layers.moe.bias"]
    bias = 8 + jnp.linspace(0, 0.02, 16)  # large with tiny differences, as in the releases
    x, w = jnp.zeros((1, 16)), jnp.zeros((16, 16))
    chosen = route(x @ w, bias, BIASED).expert_NK
    np.testing.assert_array_equal(chosen, [[15, 14]])
    wrong = route(x @ w, bias.astype("bfloat16").astype("float32"), BIASED).expert_NK
    assert (wrong != chosen).any()


def test_trap_07_weights_come_from_scores_without_bias():
    x, w, bias = drawn(7, 9, 16), drawn(8, 16, 16), jnp.linspace(0, 2, 16)
    routing = route(x @ w, bias, BIASED)
    score = np.asarray(jax.nn.sigmoid(x @ w))
    chosen = np.asarray(routing.expert_NK)

    def share(s):
        return BIASED.routed_scale * s / s.sum(axis=1, keepdims=True)

    plain_scores = np.take_along_axis(score, chosen, axis=1)
    np.testing.assert_allclose(routing.weight_NK, share(plain_scores), rtol=1e-5)
    biased = np.take_along_axis(score + np.asarray(bias), chosen, axis=1)
    assert differ(routing.weight_NK, share(biased), by=1e-2)


def test_trap_08_weights_are_normalised_and_then_scaled():
    routing = route(drawn(9, 9, 16) @ drawn(10, 16, 16), jnp.zeros(16), BIASED)
    np.testing.assert_allclose(routing.weight_NK.sum(axis=1), 2.827, rtol=1e-6)
    assert MODELS["moonlight_16b_a3b"].routed_scale == 2.446
    assert MODELS["deepseek_v3"].routed_scale == 2.5


def test_trap_09_groups_left_out_are_minus_infinity_not_zero():
    cfg = dataclasses.replace(BIASED, experts=8, embed=8, groups=4, groups_per_token=1)
    logits = jnp.linspace(-1, 1, 8)[None]
    routing = route(logits, jnp.full(8, -5.0), cfg)
    np.testing.assert_array_equal(routing.expert_NK, [[7, 6]])
    c = np.asarray(jax.nn.sigmoid(logits))[0] - 5.0
    wrong = np.argsort(-np.where(np.arange(8) // 2 == 3, c, 0.0), kind="stable")[:2]
    assert set(wrong) != {6, 7}


CLIPPED = ModelConfig(
    vocab=8,
    embed=4,
    dense_layers=1,
    moe_layers=2,
    heads=3,
    q_rank=5,
    kv_rank=6,
    nope=3,
    rope=2,
    value=4,
    ffw=8,
    experts=2,
    expert_ffw=4,
    experts_per_token=1,
)


def clipped(cfg, logit_max, params=None, updates=None):
    leaves = specs(Kimi(cfg))
    params = params or {name: jnp.ones(leaf.shape) for name, leaf in leaves.items()}
    tx = qk_clip(100.0, leaves, nope=cfg.nope)
    zero = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(lambda u, p, top: tx.update(u, tx.init(p), p, logit_max=top)[0])
    return optax.apply_updates(params, step(updates or zero, params, jnp.asarray(logit_max)))


def test_trap_14_qk_clip_is_per_head_signed_and_leaves_shared_keys_and_values():
    top = [[50.0, 400.0, 100.0], [-3.0, -jnp.inf, 99.0], [1e4, -1e9, 0.0]]
    np.testing.assert_allclose(
        clip_factor(jnp.asarray(top), 100.0), [[1, 0.25, 1], [1, 1, 1], [0.01, 1, 1]], rtol=1e-6
    )
    new = clipped(CLIPPED, top)
    assert all(np.isfinite(leaf).all() for leaf in new.values())
    touched = {n for n, leaf in new.items() if (np.asarray(leaf) != 1).any()}
    assert touched == {f"{s}.attention.{n}" for s in ("dense", "layers") for n in ("q_up", "kv_up")}
    for name, rest in (("q_up", 0.25), ("kv_up", 1.0)):
        leaf = np.asarray(new[f"dense.attention.{name}"])[0, 0]
        np.testing.assert_array_equal(leaf[[0, 2]], 1)
        np.testing.assert_allclose(leaf[1, :3], 0.5, rtol=1e-6)
        np.testing.assert_allclose(leaf[1, 3:], rest, rtol=1e-6)


def test_trap_14_qk_clip_comes_after_the_step():
    params = {n: drawn(14, *leaf.shape) for n, leaf in specs(Kimi(CLIPPED)).items()}
    step = {n: 0.5 * drawn(15, *leaf.shape) for n, leaf in specs(Kimi(CLIPPED)).items()}
    top = np.full((3, 3), 400.0)
    new = clipped(CLIPPED, top, params, step)
    w, u = params["layers.attention.kv_up"], step["layers.attention.kv_up"]
    content = np.asarray(new["layers.attention.kv_up"])[..., :3]
    np.testing.assert_allclose(content, 0.5 * (w + u)[..., :3], atol=1e-6)
    assert differ(content, (0.5 * w + u)[..., :3])


def test_trap_14_qk_clip_without_query_rank_clips_the_whole_query():
    cfg = dataclasses.replace(CLIPPED, q_rank=0)
    new = clipped(cfg, np.full((3, 3), 400.0))
    np.testing.assert_allclose(new["layers.attention.q"][0, 0, 0], [0.5] * 3 + [0.25] * 2)


def test_trap_14_statistics_of_micro_batches_are_maximum_and_sum():
    cfg = golden("kimi").cfg
    params = jax.tree.map(jnp.asarray, golden("kimi").params())
    token = jnp.asarray(np.random.default_rng(14).integers(0, cfg.vocab, (4, 12)), "int32")
    rows = plain(token)._replace(weight=jnp.ones((4, 12)))
    found = {}
    for micro in (1, 2):
        run = RunConfig(
            model=cfg,
            data=DataConfig(rows=4, context=12),
            optim=OptimConfig(name="adamw"),
            train=TrainConfig(dtype="float32", remat="none", accumulate=micro),
        )
        program = build(run)

        def cut(a, micro=micro):
            return a.reshape(micro, -1, a.shape[-1])

        step = jax.jit(lambda p, b, program=program: program.step(program.init(p), b)[1])
        found[micro] = step(params, jax.tree.map(cut, rows))
    for name, right in found[1].items():
        np.testing.assert_allclose(found[2][name], right, rtol=1e-4, err_msg=name)
    np.testing.assert_array_equal(found[2]["expert_load"].sum(axis=1), 4 * 12 * 3)


def test_trap_15_fused_weights_are_cut_inside_each_head():
    gold = golden("kimi")
    cfg, ours = gold.cfg, gold.params()["dense.attention.q_up"][0]  # [rank, heads, width]
    q_b = gold["weight/model.layers.0.self_attn.q_b_proj.weight"]
    width = cfg.nope + cfg.rope
    for h in range(cfg.heads):
        head = q_b[h * width : (h + 1) * width]
        np.testing.assert_array_equal(ours[:, h, : cfg.nope], head[: cfg.nope].T)
        np.testing.assert_array_equal(ours[:, h, cfg.nope :], head[cfg.nope :].T)
    wrong = q_b[: cfg.heads * cfg.nope].reshape(
        cfg.heads, cfg.nope, -1
    )  # all content, then all rope
    assert differ(ours[:, 1, : cfg.nope], wrong[1].T)


def test_trap_16_muon_takes_each_matrix_of_a_stack_by_itself():
    leaves = specs(Kimi(CLIPPED))
    name = "layers.moe.experts.gate"  # [layers, experts, in, out]
    grad = drawn(16, *leaves[name].shape)
    tx = scale_by_muon(leaves, dtype="float32")
    step, _ = tx.update({name: grad}, tx.init({name: grad}))
    for index in np.ndindex(2, 2):
        right = 0.2 * 4**0.5 * newton_schulz(grad[index], dtype="float32")
        np.testing.assert_allclose(step[name][index], right, atol=1e-5)
    whole = newton_schulz(grad.reshape(8, 8), dtype="float32").reshape(grad.shape)
    assert differ(step[name], 0.2 * 8**0.5 * whole)
    groups = {name: leaf.group for name, leaf in specs(Kimi(MODELS["kimi_k2"])).items()}
    adam = {name for name, group in groups.items() if group == "adam"}
    assert {"embed", "head", "norm"} <= adam
    assert all(name in ("embed", "head") or name.endswith("norm") for name in adam)
    assert groups["layers.moe.router"] == groups["layers.moe.experts.down"] == "muon"


def still(name, lr=0.5):
    """What a step does to a weight of ones whose gradient is zero."""
    leaf = specs(Kimi(CLIPPED))[name]
    tx, params = muonclip(lr, specs={name: leaf}), {name: jnp.ones(leaf.shape)}
    zero = {name: jnp.zeros(leaf.shape)}
    return optax.apply_updates(params, tx.update(zero, tx.init(params), params)[0])[name]


def test_trap_17_defaults_are_the_recipe_s_not_optax_s():
    assert OptimConfig().weight_decay == 0.1
    assert (OptimConfig().b1, OptimConfig().b2, OptimConfig().momentum) == (0.9, 0.95, 0.95)
    w = {"w": drawn(17, 3, 5)}
    ours, theirs = muonclip(1.0, ns_dtype="float32"), optax.contrib.muon(1.0)
    step = ours.update(w, ours.init(w), jax.tree.map(jnp.zeros_like, w))[0]["w"]
    right = -0.2 * 5**0.5 * newton_schulz(w["w"], dtype="float32")
    np.testing.assert_allclose(step, right, atol=1e-5)
    assert differ(step, theirs.update(w, theirs.init(w), w)[0]["w"], by=0.1)


def test_trap_18_decay_multiplies_with_the_learning_rate_alone():
    new = still("layers.moe.experts.gate")
    np.testing.assert_allclose(new, 1 - 0.5 * 0.1, rtol=1e-6)
    assert differ(new, 1 - 0.5 * 0.1 * 0.2 * 4**0.5)


@pytest.mark.parametrize("name", ["norm", "layers.attention.kv_norm", "embed", "head"])
def test_trap_19_norm_gains_and_embeddings_decay_too(name):
    np.testing.assert_allclose(still(name), 1 - 0.5 * 0.1, rtol=1e-6)


def test_design_trap_21_layers_are_numbered_through_with_any_number_of_dense_ones():
    for dense in (0, 1, 3):
        cfg = dataclasses.replace(CLIPPED, dense_layers=dense)
        leaves = specs(Kimi(cfg))
        assert leaves["layers.moe.bias"].first_layer == dense
        assert ("dense.mlp.gate" in leaves) == (dense > 0)
        top = np.full((dense + 2, 3), 1.0)
        top[dense, 1] = 400.0  # the first mixture layer's second head
        new = {name: np.array(leaf) for name, leaf in clipped(cfg, top).items()}
        assert (new["layers.attention.q_up"][0, :, 1] < 1).all()
        new["layers.attention.q_up"][0, :, 1] = new["layers.attention.kv_up"][0, :, 1] = 1
        assert all((leaf == 1).all() for leaf in new.values())
        shapes = jax.eval_shape(
            lambda p, cfg=cfg: hidden(
                bind(Kimi(cfg), p), plain(jnp.zeros((1, 4), "int32")), cfg, Policy("float32")
            )[1],
            {name: jnp.ones(leaf.shape) for name, leaf in leaves.items()},
        )
        assert shapes.logit_max.shape == (dense + 2, 3)
        assert shapes.load.shape == (2, 2)


def test_trap_24_the_files_hold_1026_billion_weights_not_1040():
    total = sum(
        np.prod(leaf.shape, dtype=object) for leaf in specs(Kimi(MODELS["kimi_k2"])).values()
    )
    assert total == 1_026_408_232_448


def test_trap_26_initial_weights_have_the_published_deviation_embeddings_too():
    leaves = specs(Kimi(dataclasses.replace(CLIPPED, vocab=300, embed=40)))
    params = initial(leaves, 0, 0.02)
    np.testing.assert_allclose(np.std(params["embed"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(params["head"]), 0.02, rtol=0.05)
    np.testing.assert_array_equal(params["layers.moe.bias"], 0)
    assert MODELS["kimi_k2"].init_std == 0.02


@pytest.mark.parametrize("context", [6, 4_096])
def test_trap_29_yarn_with_equal_ends_is_a_step_not_nan(context):
    yarn = dataclasses.replace(MODELS["kimi_k2"].yarn, context=context, beta_fast=1.0)
    # Ends are equal where both fall below channel 0 (context 6), or are clipped to the last.
    cfg = dataclasses.replace(MODELS["kimi_k2"], yarn=yarn, rope=64 if context == 6 else 2)
    found = frequencies(cfg)
    assert np.isfinite(found).all()
    if context == 6:
        plain_ones = cfg.rope_theta ** (-np.arange(0, 64, 2) / 64)
        np.testing.assert_allclose(found[0], plain_ones[0])
        np.testing.assert_allclose(found[1:], plain_ones[1:] / 32)
