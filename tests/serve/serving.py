"""A server thread over a scripted engine, for the tests of the protocol."""

import contextlib
import time
from typing import NamedTuple

import httpx
import openai
from scripted_engine import ScriptedEngine

from k2jax.serve.lifecycle import serve_in_thread
from k2jax.serve.service import Limits, ModelCard, Service
from k2jax.text.kimi_tokenizer import Tokenizer

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
NAME = "tiny"


class Serving(NamedTuple):
    url: str
    engine: ScriptedEngine
    client: openai.OpenAI
    http: httpx.Client
    service: Service


@contextlib.contextmanager
def serving(script, tokenizer=BYTES, context=4096, limits=None, engine=None, **rules):
    """Serve `script`: text (control tokens by name) or ids for each request, or a function."""
    engine = engine or {}
    made = ScriptedEngine(tokenizer, _as_function(script, tokenizer), **engine)
    card = ModelCard((NAME,), tokenizer, tokenizer.vocab, context, "k2jax-test")
    service = Service(made, card, limits=limits or Limits(), **rules)
    try:
        with serve_in_thread(service) as url, httpx.Client(base_url=url, timeout=60) as http:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
                yield Serving(url, made, client, http, service)
    finally:
        made.close()


def wait_until(is_so, seconds=60):
    """Wait for what a server does after an answer: its own thread learns of it later."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def _as_function(script, tokenizer):
    def run(request):
        said = script(request) if callable(script) else script
        return tokenizer.encode(said, special=True) if isinstance(said, str) else list(said)

    return run


def section(*calls):
    written = "".join(
        f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for id_, arguments in calls
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def user(text="Hi"):
    return [{"role": "user", "content": text}]


def say_what_user_says(request):
    """A script: the answer is what the last user's message spells, control tokens read as such."""
    text = BYTES.decode(request.prompt)
    return text.rpartition("<|im_user|>user<|im_middle|>")[2].partition("<|im_end|>")[0] or text
