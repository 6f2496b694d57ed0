"""Single promises of the engine, by the clock: `python bench/engine_cases.py MODEL [CASE ...]`.

MODEL is a run's or a published folder; its context is raised to 8,192 tokens, which changes no
time. Prints one JSON line. Cases, all by default:

prefix: prompts of 512 tokens of which the first 80% are alike, one at a time, by turns with and
    without the prefix cache: median milliseconds to the first token, and their ratio.
system_prompt: the same with 2,048 tokens.
long: four requests get new tokens; the mean milliseconds of a token before, and while a prompt of
    4,096 tokens is read, and their ratio; also the seconds to that prompt's first token.
short: milliseconds of a request of 7 + 4 tokens, of 64 + 4 and of 7 + 64.
memory: 10,000 requests of 8 + 2 tokens: the process's memory after 1,000 of them, and the largest
    difference from it afterwards.
"""

import dataclasses
import functools
import json
import os
import random
import statistics
import sys
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import k2jax
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings, Request

CONTEXT, VOCAB = 8_192, 16_000
PROMPT, SYSTEM_PROMPT, SHARED, ASKED = 512, 2_048, 0.8, 12
LONG, RUNNING = 4_096, 4
TINY, SAMPLES = 10_000, 10


def draw_ids(count: int, seed: int) -> tuple[int, ...]:
    """So many token ids."""
    draw = random.Random(seed)
    return tuple(draw.randrange(VOCAB) for _ in range(count))


class Asked:
    """A request and when its tokens came."""

    def __init__(self, engine: Engine, request: Request):
        self.began, self.times, self._done = time.perf_counter(), [], threading.Event()
        self.number = engine.submit(request, self._note)

    def _note(self, output) -> None:
        if output.ids:
            self.times.append(time.perf_counter())
        if output.finish_reason:
            self._done.set()

    def wait(self) -> "Asked":
        """Itself, once it has ended."""
        self._done.wait(600)
        return self

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began


def measure_prefix(model, tokens: int = PROMPT) -> dict[str, float]:
    """Time to the first token with and without the prefix cache, by turns."""
    engines = {on: Engine(model, EngineSettings(prefix_cache=on)).start() for on in (True, False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    alike = draw_ids(round(SHARED * tokens), 0)
    for number in range(ASKED + 1):
        prompt = alike + draw_ids(tokens - len(alike), 1 + number)
        for on, engine in engines.items():
            seconds = Asked(engine, Request(prompt, 2)).wait().first
            if number:  # nobody shares with the first
                times[on].append(1e3 * seconds)
    for engine in engines.values():
        engine.close()
    shared, whole = (statistics.median(times[on]) for on in (True, False))
    return {"ms_shared": shared, "ms_whole": whole, "ratio": whole / shared}


def measure_long(model) -> dict[str, float]:
    """Time of a token before a long prompt comes, and while it is read."""
    with Engine(model, EngineSettings(rows=8, cache_tokens=8 * CONTEXT)) as engine:
        running = [Asked(engine, Request(draw_ids(16, n), 4_000)) for n in range(RUNNING)]
        while len(running[-1].times) < 300:
            time.sleep(0.01)
        began = time.perf_counter()
        long = Asked(engine, Request(draw_ids(LONG, 9), 1)).wait()
        ended = time.perf_counter()
        before = [_pace(asked.times, began - 1, began) for asked in running]
        while_read = [_pace(asked.times, began, ended) for asked in running]
        for asked in running:
            engine.abort(asked.number)
    before_ms, read_ms = statistics.mean(before), statistics.mean(while_read)
    return {
        "ms_before": before_ms,
        "ms_while_read": read_ms,
        "ratio": read_ms / before_ms,
        "seconds": long.first,
    }


def _pace(times: list[float], start: float, end: float) -> float:
    """Mean milliseconds of a token between two moments."""
    seen = [at for at in times if start <= at <= end]
    return 1e3 * (seen[-1] - seen[0]) / (len(seen) - 1)


def measure_short(model) -> dict[str, float]:
    """Whole requests, one at a time."""
    result = {}
    with Engine(model, EngineSettings(rows=1, prefix_cache=False)) as engine:
        for prompt, new in ((7, 4), (64, 4), (7, 64)):
            request = Request(draw_ids(prompt, new), new)
            asked = [Asked(engine, request).wait() for _ in range(12)]
            times = [1e3 * (a.times[-1] - a.began) for a in asked]
            result[f"ms_{prompt}_{new}"] = statistics.median(times)
    return result


def measure_memory(model) -> dict[str, float]:
    """Memory of the process over many small requests, sixteen at a time."""
    samples = []
    with Engine(model, EngineSettings(cache_tokens=4_096)) as engine:
        for part in range(SAMPLES):
            ids = draw_ids(8 + TINY // SAMPLES, part)
            engine.run(Request(ids[at : at + 8], 2) for at in range(TINY // SAMPLES))
            samples.append(_resident_mb())
    largest = max(abs(mb - samples[0]) for mb in samples)
    return {"mb": samples[0], "largest_difference": largest / samples[0]}


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


CASES = {
    "prefix": measure_prefix,
    "system_prompt": functools.partial(measure_prefix, tokens=SYSTEM_PROMPT),
    "long": measure_long,
    "short": measure_short,
    "memory": measure_memory,
}


def main(folder: str, *names: str) -> None:
    """Measure the cases."""
    k2jax.prepare()
    model = k2jax.load(folder)
    config = dataclasses.replace(model.config, context=max(CONTEXT, model.config.context))
    model = dataclasses.replace(model, config=config)
    results = {name: CASES[name](model) for name in names or CASES}
    rounded = {
        name: {key: round(value, 4) for key, value in result.items()}
        for name, result in results.items()
    }
    print(json.dumps({"bench": "engine_cases", "cpus": os.cpu_count(), **rounded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
