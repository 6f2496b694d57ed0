"""Events of the engine reach the loop: the first and the last at once, those between together."""

import asyncio
import dataclasses

from serving import BYTES

from k2jax.inference.request import Output, Request
from k2jax.serve.running import Bridge, Running
from k2jax.serve.service import ModelCard, Service


class Engine:
    """Submits nothing; a test says what comes."""

    error = ""

    def submit(self, request, on_output):
        self.on_output = on_output
        return 1

    def abort(self, number):
        pass


def start():
    engine = Engine()
    service = Service(engine, ModelCard(("m",), BYTES, BYTES.vocab, 64))
    running = Running(service, Bridge(asyncio.get_running_loop()), [Request((1,), 9)])
    running.submit()
    return engine, running


def say(*ids, reason=None):
    return Output(tuple(ids), BYTES.decode(ids), finish_reason=reason)


def test_tokens_that_follow_each_other_fast_come_together_and_none_is_lost():
    async def run():
        engine, running = start()
        engine.on_output(say(97))
        got = [await running.next_events(30)]
        for id_ in (98, 99, 100):
            engine.on_output(say(id_))
        engine.on_output(dataclasses.replace(say(101), logprobs=("x",)))
        got.append(await running.next_events(30))
        engine.on_output(say(102, reason="length"))
        got.append(await running.next_events(30))
        return got

    first, middle, last = asyncio.run(run())
    assert first == [(0, say(97))]
    ((_, joined),) = middle
    assert (joined.ids, joined.text, joined.logprobs) == ((98, 99, 100, 101), "bcde", ("x",))
    assert last == [(0, say(102, reason="length"))]


def test_the_end_is_delivered_with_what_came_before_it():
    async def run():
        engine, running = start()
        engine.on_output(say(97))
        await running.next_events(30)
        engine.on_output(say(98))
        engine.on_output(say(99, reason="stop"))
        return await running.next_events(30)

    ((_, output),) = asyncio.run(run())
    assert (output.ids, output.finish_reason) == ((98, 99), "stop")


def test_nothing_comes_when_nothing_is_said():
    async def run():
        _, running = start()
        return await running.next_events(0.01)

    assert asyncio.run(run()) == []
