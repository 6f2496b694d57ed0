"""A thousand fuzzed requests over an engine and a model: streams say what whole answers say.

Kimi's vocabulary is used where it lies beside the project or in the folder that
`K2JAX_KIMI_TOKENIZER` names, else one of bytes.
"""

import asyncio
import os
import random
from pathlib import Path

import httpx
import pytest
from serving import BYTES
from small_model import SIZES
from streams import compare, draw_for_model

from k2jax.config import ModelConfig
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.serve.lifecycle import serve_in_thread
from k2jax.serve.service import ModelCard, Service
from k2jax.text.kimi_tokenizer import Tokenizer

STREAMS = 16
PLACES = [folder / "shared/data/kimi" for folder in Path(__file__).parents]


def open_tokenizer():
    named = os.environ.get("K2JAX_KIMI_TOKENIZER")
    places = [Path(named)] if named else [p for p in PLACES if (p / "tiktoken.model").is_file()]
    return Tokenizer.load(places[0]) if places else BYTES


@pytest.mark.slow
def test_a_thousand_requests_are_streamed_as_they_are_answered_whole():
    count = int(os.environ.get("K2JAX_FUZZED_REQUESTS", "1000"))
    tokenizer = open_tokenizer()
    cfg = ModelConfig(**SIZES | {"vocab": tokenizer.vocab, "context": 1024, "init_std": 0.2})
    model = Model(cfg, initial(specs(Kimi(cfg)), seed=3, std=cfg.init_std), tokenizer)
    engine = Engine(model, EngineSettings(rows=STREAMS, queue=256, cache_tokens=STREAMS * 1024))

    async def run(url):
        gate, rng = asyncio.Semaphore(STREAMS), random.Random(7)
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            jobs = [
                compare(client, draw_for_model(rng, tokenizer), random.Random(i), gate)
                for i in range(count)
            ]
            return await asyncio.gather(*jobs)

    with engine:
        card = ModelCard(("k2",), tokenizer, cfg.vocab, engine.context)
        with serve_in_thread(Service(engine, card)) as url:
            same = asyncio.run(run(url))
        engine.drain()
        stats = engine.stats()
    assert (same.count(False), len(same)) == (0, count)
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
