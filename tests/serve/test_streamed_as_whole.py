"""Fuzzed requests: what is streamed, joined, is what is not; nothing of the server is lost."""

import asyncio
import random

import httpx
import pytest
from serving import BYTES, serving
from streams import compare, draw

PIECES = (
    "a",
    "\u6f22",
    "\U0001f600",
    " \n",
    "STOP",
    "ST",
    "<think>",
    "</think>",
    "</thin",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "functions.f:0",
    '{"a": "\u00e9"} ',
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|im_end|>",
)
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>"
    ' {"b": [1, 2]}\n<|tool_call_end|><|tool_calls_section_end|>'
)


def script(request):
    """Nonsense by the seed: texts, bytes of characters, marks in and out of place, calls."""
    rng = random.Random(request.sampling.seed)
    ids = []
    for _ in range(rng.randint(1, 25)):
        if rng.random() < 0.2:
            ids.append(rng.randrange(256))
        else:
            text = CALL if rng.random() < 0.1 else rng.choice(PIECES)
            ids += BYTES.encode(text, special=True)
    return ids


def run(count):
    async def run_all(url):
        gate, rng = asyncio.Semaphore(16), random.Random(count)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            jobs = [compare(client, draw(rng), random.Random(i), gate) for i in range(count)]
            return await asyncio.gather(*jobs)

    with serving(script, engine={"rows": 16, "queue": 512, "seconds": 0.0005}) as server:
        same = asyncio.run(run_all(server.url))
        for _ in range(500):
            if not server.engine.stats().running:
                break
            server.http.get("/health")
        assert server.engine.stats().running == 0
        return same


def test_streams_say_what_whole_answers_say():
    assert all(run(60))


@pytest.mark.slow
def test_a_thousand_streams_say_what_whole_answers_say():
    assert all(run(1000))
