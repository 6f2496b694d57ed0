"""Whole runs of reinforcement learning, as small as they come."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_model import SIZES, end_often

from k2jax import sharding
from k2jax.checkpoint import Checkpoints
from k2jax.config import (
    ConfigError,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    to_json,
)
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings, Request, Sampling
from k2jax.model import Model
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.post.environment import SingleTurn
from k2jax.post.rl import _ShowSteps, train_rl
from k2jax.post.rl_config import RlConfig
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.weights.source import load

MODEL = ModelConfig(**SIZES)
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
# The drawn model ends after 0 to 3 tokens: rewards differ, and there is something to learn.
ENV = SingleTurn(
    "odd", 3, lambda split: list("abcdefgh"), lambda prompt, reply: float(len(reply) % 2)
)


def make_run(steps=4, rows=8, **sections):
    train = {"steps": steps, "dtype": "float32", "remat": "none", "eval_every": 0, "save_every": 2}
    train = TrainConfig(**train | {"keep": 9} | sections.pop("train", {}))
    optim = OptimConfig(learning_rate=1e-2, warmup=0, ns_dtype="float32")
    return RunConfig(
        name="rl", model=MODEL, data=DataConfig(rows=rows, context=7), optim=optim, train=train
    )


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A run's folder with drawn weights and byte tokens."""
    folder = tmp_path_factory.mktemp("init")
    params = end_often(initial(declare_kimi(MODEL), 0, 0.3), BYTES.stops)
    with Checkpoints(folder) as saved:
        saved.save(1, {"params": params}, {"config": to_json(make_run())})
    (folder / "config.json").write_text(json.dumps(to_json(make_run(steps=40))))
    BYTES.save(folder / "tiktoken.model")
    return str(folder)


def require_equal(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_ends_with_the_same_weights_and_ratios_are_one(init, tmp_path):
    run, rl = make_run(), RlConfig(group=4, eval_prompts=2)
    whole = train_rl(run, rl, ENV, tmp_path / "whole", init=init, say=lambda _: None)
    lines = read(tmp_path / "whole")
    assert [line["log_ratio"] for line in lines] == [0.0] * 4
    assert max(line["sampler_max"] for line in lines) <= 1e-4
    assert max(line["experts_differ"] for line in lines) <= 0.01
    assert all(line["skipped"] == 0 for line in lines)
    assert max(line["groups_that_teach"] for line in lines) > 0
    assert max(line["grad_norm"] for line in lines) > 0
    assert {"heldout_sampled", "reward", "truncated", "groups_that_teach"} <= set(lines[-1])
    # What a kill after the first save leaves.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    said = []
    again = train_rl(run, rl, ENV, tmp_path / "killed", init=init, say=said.append)
    require_equal(whole.params, again.params)
    assert said[0].startswith("resuming from step 2") and "odd: 8 tasks, 8 held out" in said[1]
    assert said[-1] == f"{tmp_path / 'killed'}: checkpoints, metrics.jsonl"
    train_rl(run, rl, ENV, tmp_path / "killed", init=init, say=said.append)
    assert "is finished: step 4; raise --train.steps" in said[-1]
    assert [line["loss"] for line in read(tmp_path / "killed")] == [line["loss"] for line in lines]
    with pytest.raises(ConfigError, match=r"tau 0.1, not 0.2"):
        train_rl(
            run, RlConfig(group=4, eval_prompts=2, tau=0.2), ENV, tmp_path / "whole", init=init
        )


def test_several_steps_on_one_policy_have_its_log_probabilities(init, tmp_path):
    run = make_run(train={"accumulate": 2})
    rl = RlConfig(
        group=4,
        updates=2,
        eval_prompts=2,
        temperature=1.2,
        final_temperature=0.8,
        replay_routing=True,
    )
    train_rl(run, rl, ENV, tmp_path / "run", init=init, say=lambda _: None)
    lines = read(tmp_path / "run")
    assert [line["policy_step"] for line in lines] == [0, 0, 2, 2]
    assert [line["temperature"] for line in lines] == pytest.approx(
        [1.2, 1.2 - 0.4 / 3, 1.2 - 0.8 / 3, 0.8]
    )
    assert lines[0]["log_ratio"] == lines[2]["log_ratio"] == 0.0
    assert lines[1]["log_ratio"] > 0 and lines[3]["log_ratio"] > 0
    assert [line["experts_differ"] for line in lines] == [0.0] * 4


def test_adapters_learn_from_rewards_alone_and_a_killed_run_ends_with_the_same_ones(init, tmp_path):
    run, rl = make_run(), RlConfig(group=4, eval_prompts=2, replay_routing=True)
    run = dataclasses.replace(run, lora=LoraConfig(rank=2, targets="attention,experts"))
    whole = train_rl(run, rl, ENV, tmp_path / "whole", init=init, say=lambda _: None)
    base, lines = load(init).params, read(tmp_path / "whole")
    same = {name for name in base if np.array_equal(base[name], whole.params[name])}
    assert {"embed", "head", "layers.moe.router"} <= same
    assert "layers.attention.q_up" not in same
    assert [line["log_ratio"] for line in lines] == [0.0] * 4
    assert max(line["sampler_max"] for line in lines) <= 1e-4
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    train_rl(run, rl, ENV, tmp_path / "killed", init=init, say=lambda _: None)
    files = (tmp_path / out / "adapter/adapter_model.safetensors" for out in ("whole", "killed"))
    assert len({file.read_bytes() for file in files}) == 1


def test_what_samples_fail_of_is_printed_once():
    failures, said = Counter({"KeyError: 'x'": 3}), []
    show = _ShowSteps(make_run(), SimpleNamespace(failures=failures), said.append)
    show._show_failures(1)
    failures.update(["KeyError: 'x'", "ValueError"])
    show._show_failures(2)
    assert said == [
        "step 1: samples without a reward: 3, by KeyError: 'x'",
        "step 2: samples without a reward: 1, by ValueError",
    ]


def test_an_engine_with_new_weights_answers_as_one_made_of_them():
    first, second = (initial(declare_kimi(MODEL), seed, 0.3) for seed in (0, 1))
    settings = EngineSettings(rows=4, cache_tokens=256)
    requests = [Request((5, 6, 7, *range(20)), 6, Sampling(1.0, seed=s)) for s in range(3)]
    engine = Engine(Model(MODEL, first), settings)
    before = engine.run(requests)
    engine.set_weights(second)
    after = engine.run(requests)
    fresh = Engine(Model(MODEL, second), settings).run(requests)
    assert [r.ids for r in after] == [r.ids for r in fresh]
    assert [r.ids for r in after] != [r.ids for r in before]
    engine.submit(requests[0], lambda _: None)
    with pytest.raises(RuntimeError, match="open"):
        engine.set_weights(first)


def test_weights_of_another_mesh_are_laid_out_on_the_engines():
    specs = declare_kimi(MODEL)
    settings = EngineSettings(rows=4, cache_tokens=256)
    requests = [Request((5, 6, 7, *range(20)), 6, Sampling(1.0, seed=s)) for s in range(3)]
    with jax.set_mesh(sharding.make_mesh(MeshConfig(expert=2))):
        engine = Engine(Model(MODEL, initial(specs, 0, 0.3)), settings)
    expected = Engine(Model(MODEL, initial(specs, 1, 0.3)), settings).run(requests)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, model=2))):
        engine.set_weights(initial(specs, 1, 0.3))
        assert [r.ids for r in engine.run(requests)] == [r.ids for r in expected]


OWN = """
from k2jax.post.environment import SingleTurn

def odd():
    reward = lambda prompt, reply: float(len(reply) % 2)
    return SingleTurn("odd", 3, lambda split: list("abcdefgh"), reward)
"""


@pytest.mark.slow
def test_a_command_killed_at_any_moment_ends_as_one_left_alone(init, tmp_path):
    (tmp_path / "own.py").write_text(OWN)

    def start(out):
        words = [sys.executable, "-m", "k2jax.cli", "rl", init, "--init", init]
        words += ["--env", f"{tmp_path / 'own.py'}:odd", "--out", str(tmp_path / out)]
        return subprocess.Popen([*words, "--rl.group", "4", "--rl.eval_prompts", "2"])

    assert start("whole").wait(500) == 0
    for saved in (2, 10, 24):
        process = start("killed")
        deadline = time.monotonic() + 500
        while not (tmp_path / "killed/checkpoints" / str(saved)).is_dir():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert start("killed").wait(500) == 0
    require_equal(load(tmp_path / "whole").params, load(tmp_path / "killed").params)
