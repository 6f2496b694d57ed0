"""One process of an engine in several: `python engine_worker.py ADDRESS COUNT NUMBER WHAT FILE`.

WHAT is "arrivals": requests come at random, and process 0 leaves all events in FILE; or "run" or
"serve": endless work, in `Engine.run` or in the engine's thread, and process 0 says when tokens
have come.
"""

import pickle
import random
import sys
import time
from pathlib import Path

from test_engine_model import requests_of

from k2jax import cluster
from k2jax.config import MeshConfig
from k2jax.inference.request import EngineSettings, Request
from k2jax.runtime import backend

ENDLESS = Request((5, 6, 7), 70)
ANNOUNCED: list[bool] = []


def submit_at_random(engine, requests: list[Request]) -> list[list]:
    """Submit while the engine's thread computes, abort some; all events of each."""
    draw, events, numbers = random.Random(2), [], {}
    while len(events) < len(requests):
        for request in requests[len(events) :][: draw.randrange(6)]:
            events.append([])
            numbers[engine.submit(request, events[-1].append)] = len(events) - 1
        if numbers and draw.random() < 0.3:
            engine.abort(draw.choice(list(numbers)))
        time.sleep(0.01 * draw.random())
    engine.drain()
    return events


def announce(output) -> None:
    """Say that tokens have come."""
    if len(output.ids) == 1 and not ANNOUNCED:
        ANNOUNCED.append(True)
        sys.stdout.write("began\n")
        sys.stdout.flush()


def lead(engine, what: str, file: Path) -> None:
    """Do what process 0 is to do."""
    if what == "run":
        engine.submit(ENDLESS, announce)
        engine.run(ENDLESS for _ in range(5_000))
        return
    with engine:
        if what == "arrivals":
            file.write_bytes(pickle.dumps(submit_at_random(engine, requests_of(200, greedy=True))))
            return

        def go_on(output) -> None:
            announce(output)
            if output.finish_reason:
                engine.submit(ENDLESS, go_on)

        engine.submit(ENDLESS, go_on)
        time.sleep(600)


def main(address: str, count: str, number: str, what: str, file: str) -> None:
    """Make the engine, and lead or follow."""
    mesh = MeshConfig(expert=int(count))
    backend.prepare(mesh.devices, mesh.devices)
    place = cluster.find(address, int(count), int(number))
    with cluster.member(place, {}, mesh, lambda line: None) as group:
        import jax
        from test_generate import drawn

        from k2jax import sharding
        from k2jax.inference.engine import Engine

        with jax.set_mesh(sharding.make_mesh(mesh)):
            engine = Engine(drawn(), EngineSettings(rows=8, queue=10_000))
            if group.number == 0:
                lead(engine, what, Path(file))
            else:
                if what != "run":
                    engine.warm_up()
                engine.follow()


if __name__ == "__main__":
    main(*sys.argv[1:])
