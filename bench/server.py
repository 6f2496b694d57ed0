"""What the server costs: `python bench/server.py MODEL [PAIRS]` or `... memory MODEL [REQUESTS]`.

The first compares 16 sequences at a time of the engine alone with the same streamed over HTTP to a
process of its own, in alternating pairs: tokens a second by wall clock, CPU seconds of this process
and of the client. The client shares the machine's cores with the server: what it takes slows the
server in the first figure and is no part of the second. The second bench sends requests of all
kinds, 16 at a time, and prints the server's resident memory after each twentieth. `schemas MODEL`
compares the engine with and without JSON schemas that hold its answers.
"""

import asyncio
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
STREAMS = 16
# New tokens of each request: unequal, so that they end and begin at any time, in both loads alike.
LENGTHS = [32 + 37 * i % 97 for i in range(3 * STREAMS)]
FAR = 110  # tokens that an answer is left from its limit; they fit the context of `tiny`


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


def run_alone(engine: Any, make_request: Callable[[int], Any], far: int = 0) -> None:
    """The load without a server: each next request is submitted from the event that ends one.

    With `far` each request may have so many tokens more, and is ended before them.
    """
    left, running, ended = list(LENGTHS), [0], threading.Event()

    def submit() -> None:
        running[0] += 1
        length, number, count = left.pop(), [], [0]

        def on_output(output: Any) -> None:
            count[0] += len(output.ids)
            if output.finish_reason:
                running[0] -= 1
                if left:
                    submit()
                elif not running[0]:
                    ended.set()
            elif far and count[0] == length and number:
                engine.abort(number[0])

        number.append(engine.submit(make_request(length + far), on_output))

    for _ in range(STREAMS):
        submit()
    ended.wait()


def compare_schemas(path: str, pairs: int) -> None:
    """Print what constraints cost the engine alone, against the same load without them.

    Answers are lists of objects that never end by themselves: once they are left far from their
    limit, where only the grammar holds them, and once they go to it and are closed there.
    """
    import k2jax
    from k2jax.constrain import make_constraint
    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings, Request

    model = k2jax.load(path)
    item = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": item}}}
    prompt, stops = tuple(body(1)["prompt"]), frozenset(model.tokenizer.stops)

    def make_free(length: int) -> Request:
        return Request(prompt, length)

    def make_held(length: int) -> Request:
        held = make_constraint(model.tokenizer, response_format=form)
        return Request(prompt, length, stop_ids=stops, constraint=held)

    def measure(make: Callable[[int], Request], far: int) -> tuple[float, float]:
        tokens, wall, cpu = (
            engine.stats().new_tokens_total,
            time.perf_counter(),
            time.process_time(),
        )
        run_alone(engine, make, far)
        tokens = engine.stats().new_tokens_total - tokens
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return round(tokens / wall, 1), round(1e3 * cpu / tokens, 4)

    with Engine(model, EngineSettings(rows=STREAMS)) as engine:
        rows = []
        for pair in range(-1, pairs):
            figures = [measure(make_free, FAR), measure(make_held, FAR), measure(make_held, 0)]
            if pair >= 0:
                rows.append(figures)
                print(pair, "free, far, closed: tokens/s, CPU ms a token", figures, flush=True)
        line = {}
        for place, name in ((1, "far"), (2, "closed")):
            for at, what in enumerate(("speed", "cpu")):
                ratio = statistics.median(row[place][at] / row[0][at] for row in rows)
                line[f"{name}_{what}_ratio"] = round(ratio, 3)
        print(json.dumps(line))


def compare(path: str, pairs: int) -> None:
    """Print each pair and the median ratio."""
    import k2jax
    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings, Request
    from k2jax.serve.lifecycle import serve_in_thread
    from k2jax.serve.service import ModelCard, Service

    model = k2jax.load(path)
    prompt = tuple(body(1)["prompt"])
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
                figures = [
                    _measure(lambda: run_alone(engine, lambda n: Request(prompt, n))),
                    _measure(over_http),
                ]
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


async def ask_all(url: str, first: int, last: int) -> None:
    """Send requests of all kinds by their numbers, 16 at a time; some are left in the middle."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/serve"))
    import httpx
    from streams import CHAT, draw

    gate = asyncio.Semaphore(STREAMS)

    async def ask_one(client: httpx.AsyncClient, number: int) -> None:
        draws = random.Random(number)
        fields = draw(draws) | {"stream": draws.random() < 0.5}
        fields["max_tokens"] = draws.randint(1, 32)
        if draws.random() < 0.1:  # a schema that no other request has
            name = f"f{number}"
            properties = {name: {"type": "string", "maxLength": 9}}
            schema = {"type": "object", "properties": properties}
            function = {"name": name, "parameters": schema}
            fields["tools"] = [{"type": "function", "function": function}]
        leaves = draws.random() < 0.05
        async with gate, client.stream("POST", CHAT, json=fields) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for _ in answer.aiter_lines():
                if leaves:
                    return

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(ask_one(client, number) for number in range(first, last)))


def watch_memory(path: str, count: int) -> None:
    """Print this process's resident memory after each twentieth; a process of its own asks."""
    import k2jax
    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings
    from k2jax.serve.lifecycle import serve_in_thread
    from k2jax.serve.service import ModelCard, Service

    model = k2jax.load(path)
    with Engine(model, EngineSettings(rows=STREAMS)) as engine:
        card = ModelCard(("m",), model.tokenizer, model.config.vocab, engine.context)
        with serve_in_thread(Service(engine, card)) as url:
            sizes = []
            for part in range(20):
                ends = [str(count * n // 20) for n in (part, part + 1)]
                subprocess.run([sys.executable, __file__, "ask", url, *ends], check=True)
                sizes.append(resident())
                print(f"{ends[1]} requests: {sizes[-1]:.1f} MB", flush=True)
            stats = engine.stats()
            left = stats.running + stats.waiting + stats.pages_used
            growth = {
                "growth": round(sizes[-1] / sizes[0] - 1, 4),  # since the first twentieth
                "growth_of_last_half": round(sizes[-1] / sizes[9] - 1, 4),
            }
            print(json.dumps({**growth, "requests": count, "left_in_engine": left}))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "read":
        read_streams(rest[0])
    elif what == "schemas":
        compare_schemas(rest[0], int(rest[1]) if len(rest) > 1 else 5)
    elif what == "ask":
        asyncio.run(ask_all(rest[0], int(rest[1]), int(rest[2])))
    elif what == "memory":
        watch_memory(rest[0], int(rest[1]) if len(rest) > 1 else 10_000)
    else:
        compare(what, int(rest[0]) if rest else 5)
