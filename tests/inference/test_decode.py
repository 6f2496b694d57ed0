"""Step by step equals all at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig, ModelConfig, Yarn
from k2jax.inference import decode
from k2jax.model import Kimi, Model, Policy, forward, moe
from k2jax.params.arrays import bind, initial
from k2jax.params.declare import specs

KIMI = ModelConfig(
    vocab=96,
    embed=32,
    dense_layers=1,
    moe_layers=2,
    heads=4,
    q_rank=12,
    kv_rank=16,
    nope=8,
    rope=4,
    value=8,
    ffw=48,
    experts=8,
    expert_ffw=16,
    experts_per_token=2,
    context=32,
    yarn=Yarn(factor=4.0, context=8),
    init_std=0.2,
)
MODELS = {
    "kimi": KIMI,
    "moonlight": dataclasses.replace(
        KIMI, q_rank=0, shared_experts=2, yarn=Yarn(), norm_eps=1e-5, experts_per_token=3
    ),
    "deepseek": dataclasses.replace(
        KIMI, dense_layers=3, moe_layers=1, groups=4, groups_per_token=2
    ),
}
LENGTHS = np.array([5, 1, 8], np.int32)
STEPS = 4
FLOAT32 = Policy("float32")


def drawn(cfg: ModelConfig) -> dict[str, jax.Array]:
    """Random weights; the router bias too, so that choice and weight differ."""
    params = initial(specs(Kimi(cfg)), seed=1, std=cfg.init_std)
    bias = np.random.default_rng(2).normal(size=(cfg.moe_layers, cfg.experts)) * 0.1
    placed = jax.device_put(bias.astype(np.float32), params["layers.moe.bias"].sharding)
    return params | {"layers.moe.bias": placed}


def rows_of(cfg: ModelConfig, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, cfg.vocab, (batch, 8 + STEPS)).astype(np.int32)


def stepped(cfg, params, token_BT, lengths, slots, pad=0):
    """Logits of prefill and of each step, [batch, 1 + steps, vocab]."""
    w = functools.partial(bind, Kimi(cfg))
    prompt = np.where(np.arange(8) < lengths[:, None], token_BT[:, :8], pad)
    prefill = jax.jit(lambda p, t, n: decode.prefill(w(p), t, n, cfg, slots, FLOAT32))
    step = jax.jit(
        lambda p, c, t: decode.step(w(p), decode.unstack_layers(w(p), cfg), c, t, cfg, FLOAT32)
    )
    y_BX, cache = prefill(params, *map(jnp.asarray, (prompt, lengths)))
    ours = [y_BX]
    for i in range(STEPS):
        y_BX, cache = step(
            params, cache, jnp.asarray(token_BT[np.arange(len(lengths)), lengths + i])
        )
        ours.append(y_BX)
    return np.stack([np.asarray(y) for y in ours], axis=1)


def at_once(cfg, params, token_BT, lengths):
    y_BTX = np.asarray(forward(Model(cfg, params), token_BT))
    place = lengths[:, None] - 1 + np.arange(1 + STEPS)
    return np.take_along_axis(y_BTX, place[..., None], axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_step_by_step_equals_the_full_forward(name):
    cfg = MODELS[name]
    params, token_BT = drawn(cfg), rows_of(cfg)
    ours = stepped(cfg, params, token_BT, LENGTHS, slots=8 + STEPS)
    np.testing.assert_allclose(ours, at_once(cfg, params, token_BT, LENGTHS), atol=1e-5, rtol=0)


def test_neither_padding_nor_a_longer_cache_changes_anything():
    params, token_BT = drawn(KIMI), rows_of(KIMI)
    ours = stepped(KIMI, params, token_BT, LENGTHS, slots=32)
    other = stepped(KIMI, params, token_BT, LENGTHS, slots=32, pad=77)
    np.testing.assert_array_equal(ours, other)
    np.testing.assert_allclose(ours, at_once(KIMI, params, token_BT, LENGTHS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("deepest", [0, 16])
def test_a_deep_stack_is_looped_over_with_the_same_result(monkeypatch, deepest):
    cfg = dataclasses.replace(KIMI, dense_layers=0)
    monkeypatch.setattr(decode, "MAX_UNSTACKED_LAYERS", deepest)
    params, token_BT = drawn(cfg), rows_of(cfg)
    ours = stepped(cfg, params, token_BT, LENGTHS, slots=12)
    np.testing.assert_allclose(ours, at_once(cfg, params, token_BT, LENGTHS), atol=1e-5, rtol=0)


def test_a_mesh_decodes_the_same():
    token_BT, lengths = rows_of(KIMI, 8), np.array([5, 1, 8, 3, 2, 7, 8, 4], np.int32)
    alone = stepped(KIMI, drawn(KIMI), token_BT, lengths, slots=12)
    mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))
    with jax.set_mesh(sharding.inference_mesh(mesh, specs(Kimi(KIMI)))):
        ours = stepped(KIMI, drawn(KIMI), token_BT, lengths, slots=12)
    np.testing.assert_allclose(ours, alone, atol=1e-5, rtol=0)


def run_small_batch(x_BTD: np.ndarray, small_batch: int, layer: int = 1) -> np.ndarray:
    w = bind(Kimi(KIMI), drawn(KIMI)).layers.moe
    one = bind(moe.Moe(KIMI, "moe_layers"), sliced(layer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "SMALL_BATCH_TOKENS", small_batch)
        return np.asarray(
            moe.moe_small_batch(one, w.experts, jnp.int32(layer), jnp.asarray(x_BTD), KIMI, FLOAT32)
        )


def sliced(layer: int) -> dict[str, jax.Array]:
    prefix = "layers.moe."
    return {k.removeprefix(prefix): v[layer] for k, v in drawn(KIMI).items() if prefix in k}


def test_a_small_batch_gives_what_a_large_one_gives():
    x_BTD = np.random.default_rng(3).normal(size=(5, 1, KIMI.embed)).astype(np.float32)
    np.testing.assert_allclose(
        run_small_batch(x_BTD, 16), run_small_batch(x_BTD, 0), atol=1e-5, rtol=0
    )


def test_experts_nobody_chose_are_not_read():
    x_BTD = np.ones((2, 1, KIMI.embed), np.float32)
    logit_NE = x_BTD[:, 0] @ sliced(1)["router"]
    expert_NK = moe.route(logit_NE, sliced(1)["bias"], KIMI).expert_NK
    idle = np.setdiff1d(np.arange(KIMI.experts), np.asarray(expert_NK))
    poisoned = drawn(KIMI)
    for part in ("gate", "up", "down"):
        name = f"layers.moe.experts.{part}"
        poisoned[name] = poisoned[name].at[1, idle].set(jnp.nan).at[0].set(jnp.nan)
    w = bind(Kimi(KIMI), poisoned).layers.moe
    one = bind(moe.Moe(KIMI, "moe_layers"), sliced(1))
    y_BTD = moe.moe_small_batch(one, w.experts, jnp.int32(1), jnp.asarray(x_BTD), KIMI, FLOAT32)
    assert np.isfinite(np.asarray(y_BTD)).all()
