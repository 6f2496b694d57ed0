"""The engine over a real network: tokens are the full forward's, alone, crowded and preempted."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from test_generate import BYTES, CFG, drawn

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings, Request, Sampling
from k2jax.model import Model, forward


@pytest.fixture(scope="module")
def model() -> Model:
    return drawn()


def requests_of(count: int, greedy: bool = False) -> list[Request]:
    draw = random.Random(3)
    head = [draw.randrange(512) for _ in range(33)]
    made = []
    for number in range(count):
        prompt = (*draw.choice([head, head[:17], []]), *range(number, number + draw.randint(1, 9)))
        sampling = (
            Sampling(1.0, top_p=0.9, seed=number) if number % 2 and not greedy else Sampling()
        )
        stops = frozenset(draw.sample(range(512), draw.choice([0, 0, 60])))
        texts = draw.choice([(), (), tuple("etaoin")])
        made.append(Request(prompt, draw.randint(1, 12), sampling, stops, texts, logprobs=0))
    return made


def check_greedy(model: Model, requests: list[Request], results) -> None:
    """Every token is the argmax of the full forward, with its log-probability, up to a stop."""
    rows = [[*request.prompt, *r.ids] for request, r in zip(requests, results, strict=True)]
    token_BT = np.zeros((len(rows), CFG.context), np.int32)
    for row, ids in zip(token_BT, rows, strict=True):
        row[: len(ids)] = ids
    y_BTX = np.asarray(forward(model, token_BT))
    own_BTX = np.asarray(jax.nn.log_softmax(y_BTX))
    for y_TX, own_TX, request, r in zip(y_BTX, own_BTX, requests, results, strict=True):
        places = np.arange(len(r.ids)) + len(request.prompt) - 1
        assert y_TX[places, : BYTES.vocab].argmax(axis=-1).tolist() == list(r.ids)
        expected = own_TX[places, list(r.ids)]
        np.testing.assert_allclose([e.logprob for e in r.logprobs], expected, atol=1e-5)
        assert not request.stop_ids & set(r.ids[:-1])
        whole = {"length": request.max_new_tokens, "stop": max(len(r.ids), 1)}
        assert len(r.ids) == whole.get(r.finish_reason, len(r.ids))


def test_greedy_tokens_are_the_full_forwards(model):
    requests = requests_of(24, greedy=True)
    check_greedy(model, requests, Engine(model, EngineSettings(rows=4)).run(requests))


def test_tokens_are_the_same_bits_alone_crowded_uncached_and_preempted(model):
    requests = requests_of(10)
    crowded = Engine(model, EngineSettings(rows=4)).run(requests)
    uncached = Engine(model, EngineSettings(rows=4, prefix_cache=False)).run(requests)
    small = Engine(model, EngineSettings(rows=4, cache_tokens=80))
    preempted = small.run(requests)
    for other in (uncached, preempted):
        assert [(r.ids, r.logprobs) for r in other] == [(r.ids, r.logprobs) for r in crowded]
    assert small.stats().preemptions_total
    for request, result in list(zip(requests, crowded, strict=True))[-3:]:
        (alone,) = Engine(model, EngineSettings(rows=4)).run([request])
        assert (alone.ids, alone.logprobs) == (result.ids, result.logprobs)


def test_an_engine_of_wide_programs_gives_the_full_forwards_tokens(model):
    requests = requests_of(70, greedy=True)
    engine = Engine(model, EngineSettings(rows=70, deterministic=False))
    check_greedy(model, requests, engine.run(requests))


def test_keeping_experts_changes_no_bit_and_shared_prompts_have_theirs(model):
    requests = requests_of(8)
    plain = Engine(model, EngineSettings(rows=4)).run(requests)
    keeping = Engine(model, EngineSettings(rows=4, experts=True)).run(requests)
    assert keeping == plain
    assert sum(r.cached_tokens for r in keeping) > 0
    alone = Engine(model, EngineSettings(rows=4, experts=True, prefix_cache=False))
    for request, result in zip(requests, keeping, strict=True):
        tokens = len(request.prompt) + len(result.ids) - 1
        assert result.experts.shape == (tokens, CFG.moe_layers, CFG.experts_per_token)
        np.testing.assert_array_equal(alone.run([request])[0].experts, result.experts)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 20])  # a CPU's programs have 16 at most
def test_a_warm_engine_compiles_nothing(rows, model):
    engine = Engine(model, EngineSettings(rows=rows))
    engine.warm_up()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    kinds = [
        Sampling(),
        Sampling(1.0, top_k=5),
        Sampling(0.5, presence_penalty=1.0, logit_bias={3: 1.0}),
    ]
    requests = [
        dataclasses.replace(
            request,
            sampling=kinds[number % 3],
            logprobs=(None, 0, 7)[number % 3],
            prompt_logprobs=(None, None, 0, 3)[number % 4],
        )
        for number, request in enumerate(requests_of(500))
    ]
    engine.run(requests)
    jax.monitoring.clear_event_listeners()
    assert not compiled


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"expert": 4, "model": 2}])
def test_200_requests_that_come_and_go_get_the_full_forwards_tokens(axes):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
        model = drawn()
        engine, events = Engine(model, EngineSettings(rows=8)), []
        requests, draw = requests_of(200, greedy=True), random.Random(0)
        while len(events) < 200 or engine.step():
            for request in requests[len(events) :][: draw.randrange(4)]:
                events.append([])
                number = engine.submit(request, events[-1].append)
                if draw.random() < 0.05:
                    engine.abort(number)
            engine.step()
        from k2jax.inference.request import join_outputs

        check_greedy(model, requests, [join_outputs(e) for e in events])
