"""A server with Kimi's vocabulary over random weights: every call is valid, whole and streamed."""

import asyncio
import json
import os

import httpx
import jsonschema
import numpy as np
import pytest
from acceptance_schemas import ALL
from drive import load_kimi, tool
from random_schemas import random_schema
from small_model import SIZES

from k2jax.config import ConfigError, ModelConfig
from k2jax.constrain import make_constraint
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.serve.lifecycle import serve_in_thread
from k2jax.serve.service import ModelCard, Service

CHAT, NAME, STREAMS = "/v1/chat/completions", "maps.find-way", 16
# As Kimi's API and as open-source servers have it.
THOUGHT = (
    {"thinking": {"type": "enabled"}},
    {"thinking": {"type": "disabled"}},
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": {"thinking": False}},
)


def draw_bodies(kimi, schemas):
    """Requests with the fewest tokens that a call takes, and up to 200 more."""
    for seed, schema in enumerate(schemas):
        tools, rng = [tool(schema, NAME)], np.random.default_rng(seed)
        try:
            least = make_constraint(kimi, tools=tools, tool_choice="required").least
        except ConfigError:
            continue
        yield {
            "messages": [{"role": "user", "content": "?"}],
            "tools": tools,
            "tool_choice": "required",
            "max_tokens": int(least + rng.choice([0, 1, rng.integers(2, 200)])),
            "temperature": 1.0,
            "seed": seed,
            **THOUGHT[seed % len(THOUGHT)],
        }


async def ask(client, body):
    """The calls of a whole answer and of a streamed one."""
    whole = (await client.post(CHAT, json=body)).json()
    streamed, end = {}, None
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            end = choice["finish_reason"] or end
            for piece in choice["delta"].get("tool_calls", ()):
                call = streamed.setdefault(piece["index"], {"arguments": ""})
                call["id"] = piece.get("id") or call["id"]
                call["arguments"] += piece["function"]["arguments"]
    choice = whole["choices"][0]
    assert choice["finish_reason"] == end == "tool_calls", (whole, end)
    calls = choice["message"]["tool_calls"]
    kept = [{"arguments": c["function"]["arguments"], "id": c["id"]} for c in calls]
    assert kept == list(streamed.values())
    return [json.loads(call["arguments"]) for call in kept]


@pytest.mark.slow
def test_calls_of_many_schemas_are_valid_whole_and_streamed():
    kimi = load_kimi()
    cfg = ModelConfig(**SIZES | {"vocab": kimi.vocab, "context": 4096, "init_std": 0.2})
    model = Model(cfg, initial(specs(Kimi(cfg)), seed=3, std=cfg.init_std), kimi)
    engine = Engine(model, EngineSettings(rows=STREAMS, queue=256))
    count = int(os.environ.get("K2JAX_SCHEMAS", "40"))
    bodies = list(draw_bodies(kimi, [*ALL, *(random_schema(seed) for seed in range(count))]))
    assert len(bodies) > 0.9 * (count + len(ALL))

    async def run(url):
        gate = asyncio.Semaphore(STREAMS)

        async def one(client, body):
            async with gate:
                return await ask(client, body)

        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            return await asyncio.gather(*(one(client, body) for body in bodies))

    with (
        engine,
        serve_in_thread(
            Service(engine, ModelCard(("k2",), kimi, cfg.vocab, engine.context))
        ) as url,
    ):
        answers = asyncio.run(run(url))
        assert engine.stats().running == engine.stats().waiting == 0
    for body, calls in zip(bodies, answers, strict=True):
        assert calls
        for arguments in calls:
            jsonschema.validate(arguments, body["tools"][0]["function"]["parameters"])
