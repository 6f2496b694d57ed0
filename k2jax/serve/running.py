"""The sequences of one HTTP request in the engine, as the event loop sees them.

The engine's thread puts events into a bridge and never waits; the loop takes what has come. A
client that reads slowly leaves its events waiting, at most one for each token that it asked for.
Waking the loop and writing to a socket can cost more than a small model's token does. So the loop
pauses between deliveries, for longer the more streams it writes to; tokens that come meanwhile
reach a client together.
"""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Sequence

from k2jax.inference.request import Output, QueueFull, Request
from k2jax.serve.service import EngineLike, Service

RETRY = 0.1  # seconds until a sequence is submitted again that found no room
# Seconds between deliveries for each stream that gets one, and at most. A write takes some 0.1 ms:
# 3% of a core is spent on writing. A lone stream gets its tokens one by one.
PAUSE, LONGEST_PAUSE = 0.003, 0.05

Event = tuple[int, Output]  # number of the sequence among those of the HTTP request


class Bridge:
    """Takes events of all sequences to the loop, waking it once for all that come together.

    An event is delivered at once where nothing was just before it, and where it is urgent: the
    first or the last of a sequence. After a delivery the loop looks again by itself, and nobody
    wakes it in between.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._events: list[tuple[Running, Event]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._woken = False  # a delivery is about to happen
        self._timed = False  # one will happen after a pause

    def put(self, running: "Running", event: Event, urgent: bool) -> None:
        """Pass an event on, from any thread."""
        with self._lock:
            self._events.append((running, event))
            if self._woken or (self._timed and not urgent):
                return
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: the server ends
            self._events.clear()

    def _deliver(self) -> None:
        with self._lock:
            events, self._events = self._events, []
            self._woken, self._timed = False, bool(events)
        if self._timer is not None:
            self._timer.cancel()
        pause = min(PAUSE * len({id(running) for running, _ in events}), LONGEST_PAUSE)
        self._timer = self._loop.call_later(pause, self._deliver) if events else None
        for running, event in events:
            running.take(event)


class Running:
    """Submits sequences, waits for their events, and ends them when nobody wants them.

    Attributes:
        gone: the client left.
    """

    def __init__(self, service: Service, bridge: Bridge, requests: Sequence[Request]):
        self._engine: EngineLike = service.engine
        self._service, self._bridge, self._requests = service, bridge, requests
        self._numbers: dict[int, int] = {}  # of the engine, by sequence; those that run
        self._submitted = 0
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._began, self._has_token = time.perf_counter(), False
        self._ended: set[int] = set()
        self._ignored: set[int] = set()
        self._closed = False
        self.gone = False

    def submit(self) -> None:
        """Queue the sequences; those that find no room wait here for the ones before them.

        Raises:
            QueueFull: there is no room for the first.
            ConfigError: one cannot be computed.
        """
        try:
            while self._waits:
                self._submit_one()
        except QueueFull:
            if not self._submitted:
                raise
        except BaseException:
            self.close()
            raise

    def _submit_one(self) -> None:
        place, is_first = self._submitted, True

        def pass_on(output: Output) -> None:
            nonlocal is_first
            urgent = is_first or output.finish_reason is not None
            is_first = False
            self._bridge.put(self, (place, output), urgent)

        number = self._engine.submit(self._requests[place], pass_on)
        self._numbers[place] = number
        self._submitted += 1
        if place in self._ended:  # the loop had its last event before the number was known
            self._numbers.pop(place, None)
        if self._closed:
            self._engine.abort(number)

    @property
    def _waits(self) -> bool:
        """Whether a sequence is still to be submitted."""
        return self._submitted < len(self._requests) and not self._closed

    def take(self, event: Event) -> None:
        """Keep an event that the bridge brings."""
        place, output = event
        if output.finish_reason is not None:
            self._ended.add(place)
            self._numbers.pop(place, None)
        if not self._has_token and (output.ids or output.finish_reason):
            self._has_token = True
            waited = time.perf_counter() - self._began
            self._service.meters.observe("time_to_first_token_seconds", waited)
        if place not in self._ignored:
            self._events.append(event)
        self._ready.set()

    async def next_events(self, seconds: float) -> list[Event]:
        """What has come, one event for each sequence that has any.

        Nothing when that takes longer than `seconds`, or the client left.
        """
        if not self._events and not self.gone:
            try:
                async with asyncio.timeout(RETRY if self._waits else seconds):
                    await self._ready.wait()
            except TimeoutError:
                pass
        self._ready.clear()
        outputs: dict[int, list[Output]] = {}
        for place, output in self._events:
            outputs.setdefault(place, []).append(output)
        self._events.clear()
        if self._waits:
            await asyncio.to_thread(self.submit)
        return [(place, _join(several)) for place, several in outputs.items()]

    def stop(self, place: int) -> None:
        """End one sequence, whose answer is complete; its further events are dropped."""
        self._ignored.add(place)
        if (number := self._numbers.get(place)) is not None:
            self._engine.abort(number)

    def leave(self) -> None:
        """End everything: the client is gone."""
        self.gone = True
        self._service.meters.count_gone()
        self.close()
        self._ready.set()

    def close(self) -> None:
        """End what still runs."""
        if self._closed:
            return
        self._closed = True
        for place in list(self._numbers):
            self.stop(place)
        seconds = time.perf_counter() - self._began
        self._service.meters.observe("request_duration_seconds", seconds)


def _join(outputs: Sequence[Output]) -> Output:
    """One event that says what several of a sequence say."""
    if len(outputs) == 1:
        return outputs[0]
    return dataclasses.replace(
        outputs[-1],
        ids=tuple(id_ for output in outputs for id_ in output.ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
    )
