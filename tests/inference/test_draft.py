"""Drafts by an MTP layer: its guesses are those of training, and no token changes by them."""

import dataclasses

import jax
import numpy as np
import pytest
from test_engine_model import requests_of
from test_generate import BYTES, CFG
from test_runner import BLOCK, KIMI, LENGTHS, PAGE, PAGES, PROMPTS, cut, page_tables, sequences
from test_runner import drawn as drawn_kimi

from k2jax import sharding
from k2jax.commands.generate import summarise
from k2jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from k2jax.inference.engine import Engine
from k2jax.inference.generate import continue_all
from k2jax.inference.request import EngineSettings, Request
from k2jax.inference.runner import Chunk, Runner
from k2jax.model import Kimi, Model, mtp
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.training.loop import train

AHEAD = dataclasses.replace(KIMI, moe_layers=1, mtp_layers=2)  # only the first one drafts
SMALL = dataclasses.replace(CFG, mtp_layers=1)
PLAIN = EngineSettings(rows=6, drafts=False)


def guess_all() -> list[list[np.ndarray]]:
    """The layer's logits at each new token, which the network has not read yet."""
    params, rows = drawn_kimi(AHEAD), sequences(AHEAD)
    sizes = {"rows": 16, "pages": PAGES, "page": PAGE, "block": BLOCK, "chunks": 8}
    runner = Runner(Model(AHEAD, params), **sizes, drafts=True)
    tables, at = page_tables(runner.shards), list(PROMPTS)
    for ids, pages, end in zip(rows, tables, PROMPTS, strict=True):
        runner.forward(cut(ids, pages, end, "none"))
    guesses: list[list[np.ndarray]] = [[] for _ in rows]
    while running := [i for i, ids in enumerate(rows) if at[i] < len(ids)]:
        step = [Chunk(rows[i][at[i] : at[i] + 1], at[i], tables[i], "last") for i in running]
        for i, y_X in zip(running, np.asarray(runner.draft(step)), strict=False):
            guesses[i].append(y_X)
            at[i] += 1
        wrong = [chunk._replace(tokens=[0], start=chunk.start + 1) for chunk in step]
        runner.forward([*step, *(chunk for chunk in wrong if chunk.start < 32)], decode=True)
    return guesses


@pytest.mark.parametrize(
    "axes", [{}, pytest.param({"data": 2, "expert": 2, "model": 2}, marks=pytest.mark.slow)]
)
def test_guesses_are_those_of_the_layer_in_training(axes):
    params = drawn_kimi(AHEAD)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
        guesses = guess_all()
    for ids, prompt, length, ours in zip(sequences(AHEAD), PROMPTS, LENGTHS, guesses, strict=True):
        if length > prompt:
            first, _ = mtp.logits(params, np.array([ids]), cfg=AHEAD, dtype="float32")
            theirs = np.asarray(first)[0, prompt - 1 :]  # there the token ahead is the first one
            np.testing.assert_allclose(np.stack(ours), theirs, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def random_model() -> Model:
    return Model(SMALL, initial(specs(Kimi(SMALL)), seed=3, std=SMALL.init_std), BYTES)


def test_tokens_and_log_probabilities_are_those_without_drafts_to_the_bit(random_model):
    requests = requests_of(20)
    drafting = Engine(random_model, dataclasses.replace(PLAIN, drafts=True))
    plain = Engine(random_model, PLAIN).run(requests)
    assert drafting.run(requests) == plain
    assert drafting.stats().drafted_tokens_total > 30


@pytest.mark.slow
def test_a_mesh_drafts_and_gives_the_same_tokens(random_model):
    requests = requests_of(20)
    alone = Engine(random_model, PLAIN).run(requests)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(expert=4, model=2))):
        params = initial(specs(Kimi(SMALL)), seed=3, std=SMALL.init_std)
        engine = Engine(Model(SMALL, params, BYTES), EngineSettings(rows=8))
        assert [r.ids for r in engine.run(requests)] == [r.ids for r in alone]
    assert engine.stats().drafted_tokens_total > 30


@pytest.mark.slow
def test_a_trained_layers_drafts_save_steps(tmp_path):
    (tmp_path / "text").mkdir()
    lines = "def add(x): return x + 1\n" * 200
    for number in range(8):
        (tmp_path / "text" / f"{number}.py").write_text(lines)
    sizes = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)}
    run = RunConfig(
        model=ModelConfig(**sizes | {"vocab": 576, "init_std": 0.1}),
        data=DataConfig(path=str(tmp_path / "text"), rows=8, context=32),
        optim=OptimConfig(name="adamw", learning_rate=1e-2, warmup=2, mtp_loss=1.0),
        train=TrainConfig(steps=40, dtype="float32", remat="none", eval_every=0, save_every=0),
    )
    model = train(run, tmp_path / "run", say=lambda line: None)
    prompt = tuple(model.tokenizer.encode("def add(x): return x + 1\ndef"))
    requests = [Request(prompt, 40), Request(prompt[:5], 30)]
    engines = [Engine(model, dataclasses.replace(PLAIN, drafts=on)) for on in (False, True)]
    plain, drafting = (engine.run(requests) for engine in engines)
    assert drafting == plain
    stats = engines[1].stats()
    assert stats.accepted_tokens_total > 0.3 * stats.drafted_tokens_total
    assert stats.steps_total < 0.8 * engines[0].stats().steps_total
    reports = []
    continue_all(model, requests, reports.append)
    assert summarise(reports[0])["accepted_tokens"] == stats.accepted_tokens_total > 20
