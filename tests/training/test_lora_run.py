"""A run that learns adapters alone."""

import dataclasses
import json

import httpx
import numpy as np
import pytest
from small_runs import changed, losses, terminating

import k2jax
from k2jax import cli
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, LoraConfig
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings
from k2jax.params.adapters import is_adapter
from k2jax.serve.lifecycle import serve_in_thread
from k2jax.serve.service import ModelCard, Service
from k2jax.training.loop import train


@pytest.fixture(scope="module")
def lora_run(run):
    lora = LoraConfig(rank=2, alpha=4.0, targets="attention,dense,shared,experts")
    wanted = changed(changed(run, "train", steps=4, save_every=2), "optim", name="muonclip")
    return dataclasses.replace(wanted, lora=lora)


@pytest.fixture(scope="module")
def adapted(lora_run, whole, tmp_path_factory):
    """The folder of an uninterrupted run, the model it returned, and what it printed."""
    out, lines = tmp_path_factory.mktemp("lora") / "whole", []
    return out, train(lora_run, out, init=str(whole[0]), say=lines.append), lines


def arrays(out, step):
    meta = Checkpoints(out).meta(step)["arrays"]
    return {part: {n: shape for n, (shape, _) in found.items()} for part, found in meta.items()}


def test_a_checkpoint_has_adapters_and_their_optimizer_state_alone(adapted, whole):
    saved = arrays(adapted[0], 4)
    assert saved["params"] and all(map(is_adapter, saved["params"]))
    shapes = {tuple(shape) for shape in saved["params"].values()}
    assert all(tuple(shape) in shapes for shape in saved["opt"].values() if shape)


def test_it_begins_with_the_base_s_loss_and_learns(adapted, whole, run):
    def heldout(out):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [line["heldout_loss"] for line in map(json.loads, lines) if "heldout_loss" in line]

    first, last = losses(adapted[0])[0], losses(whole[0])[-1]
    assert first == pytest.approx(last, abs=0.1)
    assert heldout(adapted[0])[-1] < heldout(whole[0])[-1]


def test_weights_without_an_adapter_are_the_base_s_bit_for_bit(adapted, whole):
    base, ours = k2jax.load(whole[0]).params, adapted[1].params
    same = {name for name in base if np.array_equal(base[name], ours[name])}
    assert {"embed", "head", "norm", "layers.moe.router", "layers.moe.bias"} <= same
    assert not same & {"layers.attention.q_up", "layers.moe.experts.down", "dense.mlp.up"}


def test_what_was_saved_loads_as_the_model_that_was_trained(adapted):
    loaded = k2jax.load(adapted[0])
    for name, w in adapted[1].params.items():
        np.testing.assert_allclose(loaded.params[name], w, rtol=0, atol=1e-6, err_msg=name)


def test_a_served_run_answers_as_its_merged_weights_do(adapted, whole, tmp_path):
    words = [str(whole[0]), str(tmp_path / "merged"), "--to", "hf", "--format", "float32"]
    assert cli.main(["convert", *words, "--adapter", str(adapted[0])]) == 0

    def answer(folder):
        model = k2jax.load(folder)
        card = ModelCard(("it",), model.tokenizer, model.config.vocab, model.config.context)
        engine = Engine(model, EngineSettings(rows=2))
        engine.warm_up = lambda: None  # compile what is used
        body = {"prompt": "def f1_2(x):", "max_tokens": 8, "temperature": 0, "logprobs": 0}
        with engine, serve_in_thread(Service(engine, card)) as url:
            (choice,) = httpx.post(f"{url}/v1/completions", json=body, timeout=300).json()[
                "choices"
            ]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    (text, logprobs), (merged, expected) = answer(adapted[0]), answer(tmp_path / "merged")
    assert text == merged
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)


def test_a_run_that_was_stopped_resumes_to_the_same_bits(adapted, lora_run, whole, tmp_path):
    out, lines = tmp_path / "again", []
    train(lora_run, out, init=str(whole[0]), say=terminating(3, lines))
    assert Checkpoints(out).latest() == 3
    model = train(lora_run, out, say=lines.append)
    assert losses(out) == losses(adapted[0])
    for name, w in adapted[1].params.items():
        assert np.array_equal(w, model.params[name]), name


def test_a_base_that_has_changed_or_gone_is_named(adapted, monkeypatch, tmp_path):
    meta, base = Checkpoints.meta, Checkpoints(adapted[0]).meta(4)["base"]
    for changed_, message in (({"identity": "0"}, "has changed since"), ({"path": "/x"}, "/x")):
        kept = {"base": base | changed_}
        monkeypatch.setattr(Checkpoints, "meta", lambda *args, kept=kept: meta(*args) | kept)
        with pytest.raises(ConfigError, match=message):
            k2jax.load(adapted[0])


def test_adapters_need_weights_to_adapt_and_the_same_settings_on_a_resume(
    adapted, lora_run, tmp_path
):
    with pytest.raises(ConfigError, match="--init WEIGHTS"):
        train(lora_run, tmp_path / "new", say=print)
    with pytest.raises(ConfigError, match=r"lora\.rank 2, not 3"):
        train(changed(lora_run, "lora", rank=3), adapted[0], say=print)
