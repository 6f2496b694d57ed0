"""A server over a model with random weights: calls are valid, and streams say the same."""

import asyncio
import json
import random
import time

import httpx
import jsonschema
import pytest
from serving import BYTES, NAME, user
from small_model import SIZES
from streams import compare, draw_for_model

from k2jax.config import ModelConfig
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings, Request
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.serve.lifecycle import serve_in_thread
from k2jax.serve.service import ModelCard, Service

CHAT = "/v1/chat/completions"
CONTEXT = 1024
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("get_weather", "a-b.c")
]


@pytest.fixture(scope="module")
def served():
    """The URL, and the engine behind it."""
    cfg = ModelConfig(**SIZES | {"context": CONTEXT, "init_std": 0.2})
    model = Model(cfg, initial(specs(Kimi(cfg)), seed=3, std=cfg.init_std), BYTES)
    engine = Engine(model, EngineSettings(rows=4, queue=64))
    engine.warm_up = lambda: None  # compile what these tests use, not all that there is
    with engine:
        card = ModelCard((NAME,), BYTES, cfg.vocab, engine.context)
        with serve_in_thread(Service(engine, card)) as url:
            yield url, engine


def ask_all(url, bodies):
    """Each body as it is and streamed, 8 at a time: pairs of choices."""

    async def ask(client, body, gate):
        async with gate:
            whole = await client.post(CHAT, json=body)
            assert whole.status_code == 200, whole.text
            events = []
            async with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        events.append(json.loads(line[6:])["choices"][0])
        return whole.json()["choices"][0], events

    async def run():
        gate = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(ask(client, body, gate) for body in bodies))

    return asyncio.run(run())


def calls_of(choice):
    return [c["function"] | {"id": c["id"]} for c in choice["message"].get("tool_calls", ())]


def streamed_calls(events):
    calls = {}
    for event in events:
        for piece in event["delta"].get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"arguments": ""})
            call |= {"id": piece["id"], "name": piece["function"]["name"]} if "id" in piece else {}
            call["arguments"] += piece["function"]["arguments"]
    return list(calls.values())


def test_required_calls_are_valid_at_any_length_and_streamed_alike(served):
    rng = random.Random(0)
    choices = ["required", {"type": "function", "function": {"name": "a-b.c"}}]
    bodies = [
        {
            "messages": user("?"),
            "tools": TOOLS,
            "tool_choice": rng.choice(choices),
            "max_tokens": rng.randint(120, 200),
            "seed": seed,
            "temperature": 1.5,
        }
        for seed in range(8)
    ]
    for choice, events in ask_all(served[0], bodies):
        calls = calls_of(choice)
        assert calls and choice["finish_reason"] == "tool_calls" == events[-1]["finish_reason"]
        for number, call in enumerate(calls):
            assert call["id"] == f"functions.{call['name']}:{number}"
            jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
        assert streamed_calls(events) == calls


def test_answers_fit_their_schema(served):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"messages": user("?"), "response_format": form, "max_tokens": 90, "seed": 1}
    ((choice, events),) = ask_all(served[0], [body])
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    text = "".join(event["delta"].get("content", "") for event in events)
    assert text == choice["message"]["content"] and choice["finish_reason"] == "stop"


def test_too_few_tokens_for_a_call_are_refused_and_so_are_schemas_that_are_none(served):
    body = {"messages": user("?"), "tools": TOOLS, "tool_choice": "required", "max_tokens": 5}
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}}
    with httpx.Client(base_url=served[0], timeout=60) as client:
        short = client.post(CHAT, json=body)
        assert short.status_code == 400 and short.json()["error"]["param"] == "max_tokens"
        wrong = client.post(CHAT, json={"messages": user(), "tools": [bad]})
        assert wrong.status_code == 400 and "f" in wrong.json()["error"]["message"]
        assert wrong.json()["error"]["param"].startswith("tools")


def test_free_text_is_streamed_alike_and_depends_on_its_seed_alone(served):
    bodies = [
        {"messages": user("?"), "max_tokens": 24, "seed": seed, "stop": ["ab"]}
        for seed in (1, 2, 3, 1)
    ]
    pairs = ask_all(served[0], bodies)
    for choice, events in pairs:
        text = "".join(event["delta"].get("content", "") for event in events)
        assert text == choice["message"]["content"]
    assert pairs[0][0]["message"] == pairs[3][0]["message"]
    assert pairs[0][0]["message"] != pairs[1][0]["message"]


def test_fuzzed_requests_are_streamed_as_they_are_answered_whole(served):
    async def run():
        gate, rng = asyncio.Semaphore(8), random.Random(1)
        async with httpx.AsyncClient(base_url=served[0], timeout=300) as client:
            jobs = [
                compare(client, draw_for_model(rng, BYTES), random.Random(i), gate)
                for i in range(12)
            ]
            return await asyncio.gather(*jobs)

    assert all(asyncio.run(run()))


def test_scores_of_a_prompt_are_the_model_s(served):
    """A prompt's log-probabilities are those that its tokens had when they were chosen."""
    prompt = [5, 6, 7]
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 1}
    with httpx.Client(base_url=served[0], timeout=60) as client:
        new = client.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"][0]
        names = new["logprobs"]["tokens"]
        ids = [BYTES.specials.get(n) for n in names]
        ids = [
            ord(n) if i is None and len(n) == 1 else int(n[-2:], 16) if i is None else i
            for n, i in zip(names, ids, strict=True)
        ]
        again = {"prompt": prompt + ids, "max_tokens": 0, "echo": True, "logprobs": 1}
        scored = client.post("/v1/completions", json=again).json()["choices"][0]["logprobs"]
    assert scored["token_logprobs"][3:] == pytest.approx(
        new["logprobs"]["token_logprobs"], abs=1e-4
    )


def test_lm_eval_gets_the_model_s_scores_over_http(served):
    pytest.importorskip("lm_eval", reason="needs lm-eval[api]")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url, engine = served
    pairs = [("ab", "c"), ("\u6f22", " d"), ("import", " os\n"), ("x", "y z")]
    model = LocalCompletionsAPI(
        model=NAME,
        base_url=f"{url}/v1/completions",
        tokenizer_backend="remote",
        num_concurrent=4,
        max_length=engine.context,
    )
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    answers = model.loglikelihood(asked, disable_tqdm=True)
    assert model.eot_token_id == BYTES.eos
    for (context, continuation), (logprob, greedy) in zip(pairs, answers, strict=True):
        # lm-eval moves white space at a context's end to the continuation; there is none.
        begun, ids = BYTES.encode(context), tuple(BYTES.encode(context + continuation))
        request = Request(ids, 0, prompt_logprobs=1, prompt_logprobs_from=len(begun))
        (result,) = engine.run([request])
        entries = [entry for entry in result.prompt_logprobs if entry]
        assert logprob == pytest.approx(sum(entry.logprob for entry in entries), abs=1e-6)
        assert greedy == all(entry.top[0][1] == entry.logprob for entry in entries)


def test_the_slots_are_free_in_the_end(served):
    end = time.monotonic() + 60
    while served[1].stats().running and time.monotonic() < end:
        time.sleep(0.05)  # clients that left
    assert served[1].stats().running == 0 and served[1].stats().waiting == 0
