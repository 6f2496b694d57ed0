"""The engine over a runner without a network: what is answered depends on the request alone."""

import dataclasses
import itertools
import random
import threading
import types

import numpy as np
import pytest
from fake_runner import FakeRunner, greedy, logits

from k2jax.config import ConfigError
from k2jax.inference.engine import Engine, each_choice
from k2jax.inference.request import (
    EngineSettings,
    QueueFull,
    Request,
    Sampling,
    join_outputs,
)
from k2jax.inference.stepper import POISONED
from k2jax.text.kimi_tokenizer import Tokenizer

LETTERS = Tokenizer({bytes([i]): i for i in range(256)})
SAMPLED = Sampling(1.0, top_p=0.9, seed=5)


def engine(settings=EngineSettings(), tokenizer=None, **kind) -> Engine:  # noqa: B008
    runner = FakeRunner(**kind)
    config = types.SimpleNamespace(vocab=runner.vocab, context=runner.context)
    return Engine(types.SimpleNamespace(config=config, tokenizer=tokenizer), settings, runner)


def drawn(count: int, seed: int = 0, most: int = 30) -> list[Request]:
    """Requests of all kinds; some begin alike."""
    draw = random.Random(seed)
    heads = [[draw.randrange(97) for _ in range(size)] for size in (5, 12, 20)]
    made = []
    for number in range(count):
        head = draw.choice([*heads, []])
        prompt = (*head, *(draw.randrange(97) for _ in range(draw.randint(1, most))))
        stops = frozenset(draw.sample(range(97), draw.choice([0, 0, 10])))
        sampling = draw.choice([Sampling(), Sampling(0.9, top_p=0.8, seed=number)])
        made.append(Request(prompt, draw.randint(1, most), sampling, stops))
    return made


def expected(request: Request) -> list[int]:
    """The greedy answer."""
    ids = greedy(request.prompt, request.max_new_tokens)
    ends = [at for at, token in enumerate(ids) if token in request.stop_ids]
    return ids[: ends[0] + 1] if ends else ids


def submit_at_random(ours: Engine, requests: list[Request]) -> list[list]:
    """Submit some between steps, abort a tenth of them at once or later; events of each."""
    draw, events, later = random.Random(1), [], {}
    while len(events) < len(requests) or ours.step():
        for request in requests[len(events) :][: draw.randrange(4)]:
            events.append([])
            number = ours.submit(request, events[-1].append)
            if draw.random() < 0.1:
                later[number] = draw.randrange(6)
        for number, count in later.items():
            if len(events[number - 1]) == count:
                ours.abort(number)
        ours.step()
    return events


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (EngineSettings(), {}),
        (EngineSettings(prefix_cache=False), {}),
        (EngineSettings(prefill_share=1.0), {"rows": 7, "pages": 200}),
        (EngineSettings(), {"pages": 21, "rows": 6}),  # too few: sequences are preempted
        (EngineSettings(deterministic=False), {"pages": 21, "rows": 6}),
        (EngineSettings(), {"page": 2, "block": 6, "pages": 70}),
        (EngineSettings(), {"pages": 84, "rows": 6, "shards": 2}),
        (EngineSettings(), {"drafts": True}),
        (EngineSettings(), {"drafts": True, "pages": 21, "rows": 6}),
        (EngineSettings(deterministic=False), {"drafts": True, "pages": 21, "rows": 6}),
        (EngineSettings(), {"drafts": True, "pages": 84, "rows": 6, "shards": 2}),
    ],
)
def test_answers_are_those_of_requests_alone_under_any_order_of_events(settings, kind):
    settings = dataclasses.replace(settings, experts=True)
    ours, requests = engine(settings, **kind), drawn(120)
    events = submit_at_random(ours, requests)
    alone = engine(pages=200)
    aborts = 0
    for request, outputs in zip(requests, events, strict=True):
        result = join_outputs(outputs)
        greedily = request.sampling.is_greedy
        whole = expected(request) if greedily else list(alone.run([request])[0].ids)
        if result.finish_reason == "abort":
            aborts += 1
            assert list(result.ids) == whole[: len(result.ids)]
        else:
            assert list(result.ids) == whole
            read = [*request.prompt, *whole][:-1]  # FakeRunner's experts are tokens
            assert result.experts[:, 0, 0].tolist() == read
            assert result.finish_reason == ("length" if result.stopped_by is None else "stop")
    assert aborts > 5
    stats = ours.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    if kind.get("pages") == 21:
        assert stats.preemptions_total > 5
    if "drafts" in kind:
        assert stats.drafted_tokens_total > 50
        assert 0.4 < stats.accepted_tokens_total / stats.drafted_tokens_total < 0.9


def test_drafts_save_steps_and_change_no_answer():
    requests = [
        Request((1, 2, 3), 40, logprobs=2),
        Request((4,), 40, SAMPLED, logprobs=0),
        Request((5, 6), 40, Sampling(0.7, logit_bias={3: 2.0, 9: -5.0}, seed=2)),
        Request((7,), 12, SAMPLED, stop_ids=frozenset(range(0, 97, 9))),
    ]
    plain, drafting = engine(rows=8, pages=200), engine(rows=8, pages=200, drafts=True)
    assert drafting.run(requests) == plain.run(requests)
    steps = [each.stats().steps_total for each in (plain, drafting)]
    assert steps[1] < 0.9 * steps[0]  # those of the one whose drafts are right least often
    assert drafting.stats().accepted_tokens_total > 30
    assert plain.stats().drafted_tokens_total == 0


def test_what_depends_on_the_next_token_is_not_drafted_behind_it():
    requests = [
        Request((1, 2, 3), 20, Sampling(presence_penalty=0.5)),
        Request((4,), 20, constraint=Only(50, at=20)),
        Request((4,), 1),
    ]
    ours = engine(rows=8, drafts=True)
    ours.run(requests)
    assert ours.stats().drafted_tokens_total == 0


def test_a_full_call_drafts_for_the_oldest_alone():
    ours = engine(rows=3, pages=100, drafts=True)
    results = ours.run([Request((number,), 10 + 10 * number) for number in range(3)])
    assert all(list(r.ids) == greedy((i,), 10 + 10 * i) for i, r in enumerate(results))
    decoding = [count for decode, count in ours._executor.runner.calls if decode]
    assert max(decoding) == 3 and 0 < ours.stats().drafted_tokens_total < 30


def test_a_prefix_is_computed_once_even_by_requests_that_come_together():
    ours = engine(rows=4, pages=100)
    prompt = tuple(range(40))
    results = ours.run(list(each_choice(Request(prompt, 5, SAMPLED), 4)))
    chunks = sum(count for decode, count in ours._executor.runner.calls if not decode)
    assert chunks == 10 + 3  # the last one, which gives logits, by each
    assert [r.cached_tokens for r in results] == [0, 36, 36, 36]
    assert len({r.ids for r in results}) == 4
    assert ours.run([Request((*prompt, 1), 1)])[0].cached_tokens == 40


def test_a_long_prompt_keeps_neither_tokens_nor_short_prompts_waiting(monkeypatch):
    ticks = itertools.count(1.0)  # every step takes as long, whatever else this machine does
    clock = types.SimpleNamespace(perf_counter=ticks.__next__)
    monkeypatch.setattr("k2jax.inference.stepper.time", clock)
    ours = engine(rows=4, pages=200, context=512, chunks=4)
    running, long, short = [], [], []
    ours.submit(Request((1, 2), 100), running.append)
    for _ in range(5):
        ours.step()
    ours.submit(Request(tuple(range(97)) * 4, 2), long.append)
    ours.submit(Request(tuple(range(10)), 2), short.append)
    steps = 0
    while not short:
        before = len(running)
        ours.step()
        steps += 1
        assert len(running) == before + 1
    assert steps < 12 and not long


def test_the_oldest_prompt_moves_on_among_many_short_ones():
    ours = engine(EngineSettings(prefill_share=1.0), rows=4, pages=200, context=512, chunks=2)
    long = []
    ours.submit(Request(tuple(range(97)) * 2, 1), long.append)
    for number in range(200):
        ours.submit(Request((number % 97, 5, 6, 7, 8), 1), lambda output: None)
        ours.step()
        if long:
            break
    assert number < 60


def test_a_full_queue_refuses_and_a_draining_engine_takes_nothing():
    ours = engine(EngineSettings(queue=2))
    seen = []
    for _ in range(2):
        ours.submit(Request((1,), 3), seen.append)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        ours.submit(Request((1,), 3), seen.append)
    ours.drain()
    assert sum(output.finish_reason == "length" for output in seen) == 2
    with pytest.raises(QueueFull, match="takes no more"):
        ours.submit(Request((1,), 3), seen.append)


def test_a_thread_serves_many_and_close_aborts_the_rest():
    requests, ends = drawn(40), {}
    done = threading.Event()

    def listen(index):
        def on_output(output):
            ends.setdefault(index, []).append(output)
            if len([1 for e in ends.values() if e[-1].finish_reason]) == 40:
                done.set()

        return on_output

    ours = engine(pages=100).start()
    for index, request in enumerate(requests):
        ours.submit(request, listen(index))
    assert done.wait(30)
    for index, request in enumerate(requests):
        if request.sampling.is_greedy:
            assert list(join_outputs(ends[index]).ids) == expected(request)
    endless = []
    ours.submit(Request((1,), 250), endless.append)
    assert list(ours.run([Request((3,), 4)])[0].ids) == greedy((3,), 4)
    ours.close()
    assert endless[-1].finish_reason in ("abort", "length")


class Only:
    """A constraint: one token, again and again; broken from some step on."""

    def __init__(self, token, breaks="", at=2, size=4):
        self.token, self.breaks, self.left, self.size = token, breaks, at, size
        self.accepted = []

    def start(self, max_new_tokens):
        if max_new_tokens < 2:
            raise ConfigError("max_new_tokens is below 2")

    def mask(self):
        self.left -= 1
        if self.breaks == "mask" and self.left < 0:
            raise ValueError("no grammar")
        words = np.zeros(self.size, np.uint32)
        if not (self.breaks == "empty" and self.left < 0):
            words[self.token // 32] = 1 << (self.token % 32)
        return words

    def accept(self, token):
        self.accepted.append(token)
        if self.breaks == "accept" and len(self.accepted) == 2:
            raise ValueError("not this one")


@pytest.mark.parametrize(
    ("breaks", "reason", "count"),
    [("", "length", 4), ("mask", "error", 2), ("accept", "error", 2), ("empty", "stop", 2)],
)
def test_a_constraint_chooses_and_a_broken_one_ends_its_request_alone(breaks, reason, count):
    ours = engine()
    requests = [
        Request((1, 2), 4, Sampling(1.0), constraint=Only(50, breaks)),
        Request((1, 2, 3), 6),
    ]
    first, second = ours.run(requests)
    assert (first.finish_reason, first.ids) == (reason, (50,) * count)
    assert bool(first.error) == (reason == "error")
    assert list(second.ids) == greedy((1, 2, 3), 6)
    with pytest.raises(ConfigError, match="below 2"):
        ours.run([Request((1,), 1, constraint=Only(3))])


def test_a_poisoned_request_ends_alone():
    ours = engine()
    ours._executor.runner.poison = 96
    requests = [Request((1, 96), 4), Request((1, 3), 4), Request((96,), 0, prompt_logprobs=0)]
    requests.append(Request((5, 96, 7), 0, prompt_logprobs=1))
    results = ours.run(requests)
    assert [r.finish_reason for r in results] == ["error", "length", "length", "error"]
    assert results[0].error == POISONED and results[0].ids == ()
    assert list(results[1].ids) == greedy((1, 3), 4)


def test_a_listener_that_raises_ends_its_request_alone():
    ours, seen = engine(), []

    def broken(output):
        raise KeyError("gone")

    ours.submit(Request((1,), 5), broken)
    ours.submit(Request((2,), 5), seen.append)
    ours.drain()
    assert list(join_outputs(seen).ids) == greedy((2,), 5)
    assert ours.stats().finished_error_total == 1


def test_a_broken_device_ends_every_request_with_its_error():
    ours, seen = engine(), []
    ours.submit(Request((1,), 5), seen.append)
    ours._executor.runner.forward = None
    with pytest.raises(TypeError):
        ours.drain()
    assert seen[-1].finish_reason == "error" and "NoneType" in seen[-1].error
    with pytest.raises(QueueFull, match="NoneType"):
        ours.submit(Request((1,), 5), seen.append)


def softmax(tokens) -> np.ndarray:
    y_X = logits(tokens).astype(np.float64)
    return y_X - np.log(np.exp(y_X).sum())


@pytest.mark.parametrize("kind", [{}, {"pages": 12, "rows": 3}])
def test_logprobs_are_the_models_own(kind):
    ours = engine(**kind)
    requests = [
        Request((7, 8, 9, 10, 11, 12), 3, Sampling(0.5, seed=1), logprobs=2, prompt_logprobs=3),
        Request((7, 8, 9, 10, 11, 13), 5, Sampling(presence_penalty=9.0), logprobs=0),
        Request((7, 8, 9, 10, 11, 14), 0, prompt_logprobs=0, prompt_logprobs_from=5),
        Request((5,), 9),
    ]
    for request, result in zip(requests, ours.run(requests), strict=True):
        tokens = [*request.prompt, *result.ids]
        entries = [*result.prompt_logprobs, *result.logprobs]
        first = len(tokens) - len(entries)
        if request.prompt_logprobs is not None:
            assert first == request.prompt_logprobs_from
        for place, entry in enumerate(entries, first):
            if place == 0:
                assert entry is None
                continue
            own = softmax(tokens[:place])
            assert entry.id == tokens[place]
            assert entry.logprob == pytest.approx(own[tokens[place]], abs=1e-5)
            n = request.logprobs if place >= len(request.prompt) else request.prompt_logprobs
            assert [i for i, _ in entry.top] == np.argsort(-own)[: n or 0].tolist()
            np.testing.assert_allclose(
                [p for _, p in entry.top], own[[i for i, _ in entry.top]], atol=1e-5
            )


def test_scoring_shares_prefixes_but_for_what_is_scored():
    ours = engine(rows=4, pages=100)
    context = tuple(range(30))
    requests = [
        Request((*context, 40 + i, 41 + i), 0, prompt_logprobs=1, prompt_logprobs_from=30)
        for i in range(4)
    ]
    results = ours.run(requests)
    assert [r.cached_tokens for r in results] == [0, 28, 28, 28]
    assert [len(r.prompt_logprobs) for r in results] == [2] * 4


def test_texts_stream_and_stop_across_token_borders():
    ours = engine(tokenizer=LETTERS, vocab=600)
    whole = ours.run([Request((1, 2), 12)])[0]
    assert whole.text == LETTERS.decode(whole.ids)
    letters = [i for i in whole.ids if i < 256]
    end = LETTERS.decode(whole.ids)[3:5]
    seen = []
    ours.submit(Request((1, 2), 12, stop=(end,)), seen.append)
    ours.drain()
    result = join_outputs(seen)
    assert result.stopped_by == end and result.text == whole.text[: whole.text.index(end)]
    assert result.ids == whole.ids[: len(result.ids)] and letters is not None


MISTAKES = {
    "no token ids": Request((), 1),
    "has the id 97": Request((97,), 1),
    "max_new_tokens is 0": Request((1,), 0),
    "at most 2 new tokens fit": Request((1,) * 250, 3),
    "prompt_logprobs_from is 4": Request((1,), 1, prompt_logprobs_from=4),
    "logprobs is 21": Request((1,), 1, logprobs=21),
    "stop has the id -1": Request((1,), 1, stop_ids=frozenset([-1])),
    "has no tokenizer": Request((1,), 1, stop=("a",)),
    "temperature is nan": Request((1,), 1, Sampling(float("nan"))),
    "top_p is 0": Request((1,), 1, Sampling(1.0, top_p=0)),
    "min_p is 2": Request((1,), 1, Sampling(1.0, min_p=2)),
    "top_k is -1": Request((1,), 1, Sampling(1.0, top_k=-1)),
    "repetition_penalty is 0": Request((1,), 1, Sampling(repetition_penalty=0)),
    "logit_bias has the id 97": Request((1,), 1, Sampling(logit_bias={97: 1.0})),
    "logit_bias of 5 is nan": Request((1,), 1, Sampling(logit_bias={5: float("nan")})),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_one_line(message):
    with pytest.raises(ConfigError, match=message) as error:
        engine(pages=64, context=252).run([Request((1,), 1), MISTAKES[message]])
    assert "\n" not in str(error.value)
