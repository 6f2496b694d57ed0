"""Chunks over pages equal the whole forward pass, however sequences are cut and packed."""

import dataclasses

import jax
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig, ModelConfig, Yarn
from k2jax.inference import forward as network
from k2jax.inference.runner import Chunk, Runner
from k2jax.model import Kimi, Model, forward
from k2jax.params.arrays import initial
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
PAGE, BLOCK, PAGES = 4, 8, 128
LENGTHS, PROMPTS = (9, 1, 21, 32), (5, 1, 17, 16)


def drawn(cfg: ModelConfig) -> dict[str, jax.Array]:
    """Random weights; the router bias too, so that choice and weight differ."""
    params = initial(specs(Kimi(cfg)), seed=1, std=cfg.init_std)
    bias = np.random.default_rng(2).normal(size=(cfg.moe_layers, cfg.experts)) * 0.1
    placed = jax.device_put(bias.astype(np.float32), params["layers.moe.bias"].sharding)
    return params | {"layers.moe.bias": placed}


def sequences(cfg: ModelConfig) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, cfg.vocab, length).tolist() for length in LENGTHS]


def make_runner(cfg: ModelConfig, params: dict[str, jax.Array]) -> Runner:
    return Runner(Model(cfg, params), rows=16, pages=PAGES, page=PAGE, block=BLOCK, chunks=8)


def page_tables(shards: int) -> list[list[int]]:
    """Pages of each sequence, scattered over a part of the pool; all in the last two parts."""
    part = PAGES // shards
    free = [
        np.random.default_rng(i).permutation(np.arange(i * part + 1, (i + 1) * part)).tolist()
        for i in range(shards)
    ]
    return [
        [free[-1 - i % min(shards, 2)].pop() for _ in range(0, length, PAGE)]
        for i, length in enumerate(LENGTHS)
    ]


def cut(ids: list[int], pages: list[int], end: int, want: str = "all") -> list[Chunk]:
    return [Chunk(ids[at : min(at + BLOCK, end)], at, pages, want) for at in range(0, end, BLOCK)]


def run_chunked(runner: Runner, rows: list[list[int]]) -> list[np.ndarray]:
    """Logits of every token: prompts all at once, then token by token."""
    tables = page_tables(runner.shards)
    chunks = [
        chunk
        for ids, pages, end in zip(rows, tables, PROMPTS, strict=True)
        for chunk in cut(ids, pages, end)
    ]
    of_prompts = iter(np.asarray(runner.forward(chunks)))
    logits = [[next(of_prompts) for _ in range(end)] for end in PROMPTS]
    while running := [i for i, ids in enumerate(rows) if len(logits[i]) < len(ids)]:
        step = [
            Chunk(rows[i][len(logits[i]) :][:1], len(logits[i]), tables[i], "last") for i in running
        ]
        for i, y_X in zip(running, np.asarray(runner.forward(step, decode=True)), strict=False):
            logits[i].append(y_X)
    return [np.stack(y) for y in logits]


def run_whole(cfg: ModelConfig, params: dict[str, jax.Array]) -> list[np.ndarray]:
    token_BT = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, ids in zip(token_BT, sequences(cfg), strict=True):
        row[: len(ids)] = ids
    y_BTX = np.asarray(forward(Model(cfg, params), token_BT))
    return [y_TX[:length] for y_TX, length in zip(y_BTX, LENGTHS, strict=True)]


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_the_full_forward(name):
    cfg = MODELS[name]
    params = drawn(cfg)
    ours = run_chunked(make_runner(cfg, params), sequences(cfg))
    assert_close(ours, run_whole(cfg, params))


def test_a_deep_stack_is_looped_over_with_the_same_result(monkeypatch):
    monkeypatch.setattr(network, "MAX_UNSTACKED_LAYERS", 0)
    cfg = dataclasses.replace(KIMI, norm_eps=2e-6)  # programs are shared by all of one config
    params = drawn(cfg)
    ours = run_chunked(make_runner(cfg, params), sequences(cfg))
    assert_close(ours, run_whole(cfg, params))


def test_a_mesh_computes_the_same():
    whole = run_whole(KIMI, drawn(KIMI))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))):
        ours = run_chunked(make_runner(KIMI, drawn(KIMI)), sequences(KIMI))
    assert_close(ours, whole)
