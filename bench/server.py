"""What the server costs: `python bench/server.py MODEL [PAIRS]`, or `... memory [REQUESTS]`.

The first compares 16 sequences at a time of the engine alone with the same streamed over HTTP to a
process of its own, in alternating pairs: tokens a second by wall clock, CPU seconds of this process
and of the client. The client shares the machine's cores with the server: what it takes slows the
server in the first figure and is no part of the second. The second bench sends requests of all
kinds, 16 at a time, to a server over a scripted engine and prints its resident memory after each
tenth.
"""

import asyncio
import dataclasses
import json
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
STREAMS = 16
# New tokens of each request: unequal, so that they end and begin at any time, in both loads alike.
LENGTHS = [32 + 37 * i % 97 for i in range(3 * STREAMS)]


def body(length: int) -> dict[str, Any]:
    """A request of a load."""
    sampling = {"temperature": 0, "ignore_eos": True}
    return {"prompt": [5, 6, 7, 8], "max_tokens": length, "stream": True, **sampling}


def ask(host: str, port: int, length: int) -> socket.socket:
    """A connection on which one stream has been asked for."""
    content = json.dumps(body(length)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((host, port))
    connection.sendall(head.encode() + content)
    return connection


def read_streams(url: str) -> None:
    """A client's process: for each line on stdin the load, 16 streams at a time; a line back.

    It reads sockets and looks at nothing, so that what is measured is the server. The line has the
    CPU seconds that it took.
    """
    host, port = url.removeprefix("http://").split(":")
    for _ in sys.stdin:
        began, size, left = time.process_time(), 0, list(LENGTHS)
        with selectors.DefaultSelector() as selector:
            for _ in range(STREAMS):
                selector.register(ask(host, int(port), left.pop()), selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 16)
                    size += len(data)
                    if not data:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                        if left:
                            made = ask(host, int(port), left.pop())
                            selector.register(made, selectors.EVENT_READ)
        assert size > sum(LENGTHS), "the server did not answer"
        sys.stdout.write(f"{time.process_time() - began:.3f}\n")
        sys.stdout.flush()


def run_alone(engine: Any, request: Any) -> None:
    """The load without a server: each next request is submitted from the event that ends one."""
    left, running, ended = list(LENGTHS), [0], threading.Event()

    def submit() -> None:
        running[0] += 1
        engine.submit(dataclasses.replace(request, max_new_tokens=left.pop()), on_output)

    def on_output(output: Any) -> None:
        if output.finish_reason:
            running[0] -= 1
            if left:
                submit()
            elif not running[0]:
                ended.set()

    for _ in range(STREAMS):
        submit()
    ended.wait()


def compare(path: str, pairs: int) -> None:
    """Print each pair and the median ratio."""
    import k2jax
    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings, Request
    from k2jax.serve.lifecycle import serve_in_thread
    from k2jax.serve.service import ModelCard, Service

    model = k2jax.load(path)
    request = Request(tuple(body(1)["prompt"]), 1)
    with Engine(model, EngineSettings(rows=STREAMS)) as engine:
        card = ModelCard(("m",), model.tokenizer, model.config.vocab, engine.context)
        with serve_in_thread(Service(engine, card)) as url:
            words = [sys.executable, __file__, "read", url]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            client = subprocess.Popen(words, **pipes)

            def over_http() -> None:
                client.stdin.write("\n")
                client.stdin.flush()
                reading.append(float(client.stdout.readline()))

            ratios, reading = [], []
            for pair in range(-1, pairs):
                figures = [_measure(lambda: run_alone(engine, request)), _measure(over_http)]
                if pair >= 0:  # the first is a warm-up
                    ratios.append([b / a for a, b in zip(*figures, strict=True)])
                    text = "alone, served: tokens/s, CPU s"
                    print(pair, text, figures, "client:", reading[-1], flush=True)
            speed, cpu = (statistics.median(r) for r in zip(*ratios, strict=True))
            print(json.dumps({"speed_ratio": round(speed, 3), "cpu_ratio": round(cpu, 3)}))
            client.stdin.close()
            client.wait()


def _measure(run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - wall
    return round(sum(LENGTHS) / seconds, 1), round(time.process_time() - cpu, 3)


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
