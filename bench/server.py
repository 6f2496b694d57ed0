"""What the server costs: `python bench/server.py MODEL [PAIRS]`, or `... memory [REQUESTS]`.

The first compares 16 sequences of the engine alone with the same 16 streamed over HTTP to a process
of its own, in alternating pairs: tokens a second by wall clock, CPU seconds of this process. The
second sends requests of all kinds, 16 at a time, to a server over a scripted engine and prints its
resident memory after each tenth.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
STREAMS, NEW = 16, 128
BODY = {
    "prompt": [5, 6, 7, 8],
    "max_tokens": NEW,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


async def read_stream(host: str, port: int) -> int:
    """Ask for one stream and read it to its end; bytes."""
    body = json.dumps(BODY).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    size = 0
    while data := await reader.read(1 << 16):
        size += len(data)
    writer.close()
    return size


def read_streams(url: str) -> None:
    """A client's process: 16 streams for each line on stdin; a line back when they have ended."""
    host, port = url.removeprefix("http://").split(":")

    async def run() -> None:
        await asyncio.gather(*(read_stream(host, int(port)) for _ in range(STREAMS)))

    for _ in sys.stdin:
        asyncio.run(run())
        sys.stdout.write("\n")
        sys.stdout.flush()


def compare(path: str, pairs: int) -> None:
    """Print each pair and the median ratio."""
    import k2jax
    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings, Request
    from k2jax.serve.lifecycle import serve_in_thread
    from k2jax.serve.service import ModelCard, Service

    model = k2jax.load(path)
    request = Request(tuple(BODY["prompt"]), NEW)
    with Engine(model, EngineSettings(rows=STREAMS)) as engine:
        card = ModelCard(("m",), model.tokenizer, model.config.vocab, engine.context)
        with serve_in_thread(Service(engine, card)) as url:
            words = [sys.executable, __file__, "read", url]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            client = subprocess.Popen(words, **pipes)

            def over_http() -> None:
                client.stdin.write("\n")
                client.stdin.flush()
                client.stdout.readline()

            def alone() -> None:
                left, ended = itertools.count(1), threading.Event()

                def on_output(output: object) -> None:
                    if output.finish_reason and next(left) == STREAMS:
                        ended.set()

                for _ in range(STREAMS):
                    engine.submit(request, on_output)
                ended.wait()

            ratios = []
            for pair in range(-1, pairs):
                figures = [_measure(alone), _measure(over_http)]
                if pair >= 0:  # the first is a warm-up
                    ratios.append([b / a for a, b in zip(*figures, strict=True)])
                    print(pair, "alone, served: tokens/s, CPU s", figures, flush=True)
            speed, cpu = (statistics.median(r) for r in zip(*ratios, strict=True))
            print(json.dumps({"speed_ratio": round(speed, 3), "cpu_ratio": round(cpu, 3)}))
            client.stdin.close()
            client.wait()


def _measure(run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - wall
    return round(STREAMS * NEW / seconds, 1), round(time.process_time() - cpu, 3)


def resident() -> float:
    """Megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch_memory(count: int) -> None:
    """Print resident memory after each tenth of the requests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/serve"))
    import httpx
    from serving import serving
    from test_streamed_as_whole import CHAT, draw, script

    async def ask(client: httpx.AsyncClient, rng: random.Random, gate: asyncio.Semaphore) -> None:
        async with gate:
            fields = draw(rng) | {"stream": rng.random() < 0.5}
            async with client.stream("POST", CHAT, json=fields) as answer:
                async for _ in answer.aiter_lines():
                    if rng.random() < 0.01:
                        return

    async def ask_all(url: str, part: int) -> None:
        gate = asyncio.Semaphore(STREAMS)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            each = range(part * count // 10, (part + 1) * count // 10)
            await asyncio.gather(*(ask(client, random.Random(i), gate) for i in each))

    with serving(script, engine={"rows": STREAMS, "queue": 512}) as server:
        sizes = []
        for part in range(10):
            asyncio.run(ask_all(server.url, part))
            server.engine.requests.clear()
            server.engine.aborted.clear()
            sizes.append(resident())
            print(f"{(part + 1) * count // 10} requests: {sizes[-1]:.1f} MB", flush=True)
        stats = dataclasses.asdict(server.engine.stats())
        growth = sizes[-1] / sizes[4] - 1
        print(json.dumps({"growth_of_last_half": round(growth, 4), "running": stats["running"]}))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "read":
        read_streams(rest[0])
    elif what == "memory":
        watch_memory(int(rest[0]) if rest else 10_000)
    else:
        compare(what, int(rest[0]) if rest else 5)
