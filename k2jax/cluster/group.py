"""This process among the others: what they agree upon, and who is gone."""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from k2jax.cluster.detect import Place
from k2jax.cluster.rendezvous import (
    EXIT_RETRY,
    Lost,
    accept_workers,
    connect_to_coordinator,
    is_loopback,
)
from k2jax.cluster.wire import Message, Wire
from k2jax.config import ConfigError

BEAT = 5.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one, after which a process counts as lost
PARTING = 5.0  # seconds process 0 waits for the others to have heard why it ends


class Group:
    """The processes of one run, all of them connected with process 0.

    A thread watches the connections. A process that dies closes its own, one whose machine or
    network dies falls silent; either way process 0 tells the others, and all of them end with
    one line. A group of one does nothing.
    """

    def __init__(
        self,
        place: Place | None = None,
        end: Callable[[str, int], None] | None = None,
        remedy: str = "",
    ):
        """Meet the other processes.

        Args:
            place: of this process; None: it is alone.
            end: called with a line and an exit code when the run cannot go on; by default it
                prints the line and ends the process at once, whatever it is doing.
            remedy: what to do when a process was lost, for that line.

        Raises:
            Lost: some did not come within ARRIVAL seconds, or process 0 could not be reached.
            ConfigError: process 0 has no place for this one, or the shared key is malformed.
        """
        self.count, self.number = (place.processes, place.process) if place else (1, 0)
        self.host = socket.gethostname()
        self.wires: dict[int, Wire] = {}
        self.refused, self.refusal = 0, ""  # connections to process 0; why the first process was
        self._end = end or _end
        self._remedy = f", and {remedy}" if remedy else ""
        self._told: dict[str, dict[int, Any]] = {}  # by topic and process
        self._requests: list[tuple[str, str]] = []  # what was asked for, and by which process
        self._answers: dict[str, Callable[[str], None]] = {}
        self._news = threading.Condition()
        self._over = False
        self._ended = threading.Event()
        if place is None:
            return
        (accept_workers if self.number == 0 else connect_to_coordinator)(self, place.coordinator)
        self._watch = threading.Thread(target=self._listen, name="k2jax-watch", daemon=True)
        self._watch.start()

    def gather(self, topic: str, facts: Any) -> list[Any]:
        """What every process says, in the order of their numbers; empty but on process 0."""
        if self.number:
            self.wires[0].send({"topic": topic, "facts": facts})
            return []
        with self._news:
            said = self._told.setdefault(topic, {})
            said[0] = facts
            self._wait(lambda: len(said) == self.count)
            del self._told[topic]
        return [said[number] for number in range(self.count)]

    def tell(self, topic: str, value: Any = None) -> Any:
        """What process 0 says; the others wait for it and their `value` does not count."""
        if self.number == 0:
            for wire in self.wires.values():
                wire.send({"topic": topic, "facts": value})
            return value
        with self._news:
            self._wait(lambda: topic in self._told)
            return self._told.pop(topic)[0]

    def request(self, what: str) -> None:
        """Ask process 0 for something that nobody waits for; from any thread."""
        if self.number:
            self.wires[0].send({"request": what})

    def on_request(self, what: str, answer: Callable[[str], None]) -> None:
        """On process 0, call `answer` with the name of each other process that asks for it.

        It is called by the thread that listens, and at once for those that have asked already.
        """
        with self._news:
            self._answers[what] = answer
            asked = [name for request, name in self._requests if request == what]
        for name in asked:
            answer(name)

    def _take_request(self, what: str, name: str) -> None:
        with self._news:
            self._requests.append((what, name))
            answer = self._answers.get(what)
        if answer is not None:
            answer(name)

    def _wait(self, come: Callable[[], bool]) -> None:
        self._news.wait_for(lambda: come() or self._over)
        if not come():
            raise Lost("the run ends while this process waits for the others")

    def require_equal(self, topic: str, facts: Mapping[str, Any]) -> None:
        """Wait for all processes, and require that their facts are equal.

        Raises:
            ConfigError: on every process: which of them differ from process 0, and in what.
        """
        if self.count == 1:
            return
        said = self.gather(topic, dict(facts))
        line = self.tell(f"{topic}: verdict", difference(said, self.names()) if said else "")
        if line:
            raise ConfigError(line)

    def names(self) -> list[str]:
        """`process 2 (host-c)` for each; only process 0 knows all hosts."""
        hosts = {wire.number: wire.host for wire in self.wires.values()} | {self.number: self.host}
        return [f"process {number} ({hosts.get(number, '?')})" for number in range(self.count)]

    def address(self) -> str:
        """This host's, by which others reach it; of loopback, if that is all there is."""
        names = [wire.connection.getsockname()[0] for wire in self.wires.values()]
        names = [name.removeprefix("::ffff:") for name in names]  # an IPv4 address as IPv6
        return next((name for name in names if not is_loopback(f"{name}:0")), names[0])

    def fail(self, line: str, code: int) -> None:
        """Tell the others why this process ends; afterwards nothing is watched.

        Where another thread is ending this process already, waits for that: one line is enough.
        """
        if self._finish():
            self._farewell(line, code)
        else:
            # No longer than its farewell takes: `close` may have been interrupted after its end.
            self._ended.wait(2 * PARTING)

    def _farewell(self, line: str, code: int) -> None:
        for wire in self.wires.values():
            wire.send({"end": line, "code": code})
        self._part()

    def close(self) -> None:
        """Leave, once all others are ready to."""
        if self.count == 1 or self._over:
            return
        self.gather("the end", None)
        if self.number == 0:
            self._finish()  # before the others hear that they may go: none of them is lost then
        self.tell("the end: all")
        self._finish()
        self._watch.join()
        self._part()

    def _finish(self) -> bool:
        """From now on nobody who goes is lost. True for the first thread to say so."""
        with self._news:
            first, self._over = not self._over, True
            self._news.notify_all()
        return first

    def _part(self) -> None:
        """Close the connections; process 0 last, and when what it sent has been read."""
        until = time.monotonic() + (PARTING if self.number == 0 else 0)
        for wire in self.wires.values():
            with contextlib.suppress(OSError):
                wire.connection.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                wire.connection.settimeout(left)
                if wire.receive() is None:
                    break
        for wire in self.wires.values():
            wire.close()

    def _listen(self) -> None:
        """The thread: keep what comes, give signs of life, notice who is gone."""
        with selectors.DefaultSelector() as ready:
            for wire in self.wires.values():
                ready.register(wire, selectors.EVENT_READ, wire)
            next_beat = 0.0
            while not self._over:
                for key, _ in ready.select(min(BEAT, 0.2)):
                    self.take(key.data, key.data.receive())
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + BEAT
                    for wire in self.wires.values():
                        wire.send({"beat": 1})
                for wire in self.wires.values():
                    if now - wire.heard > SILENCE:
                        self._lost(wire, f"has not been heard of for {SILENCE:.0f} s")

    def take(self, wire: Wire, messages: list[Message] | None) -> None:
        """Keep what came from another process; None: nothing more will."""
        if messages is None:
            self._lost(wire, "is gone")
        for message in messages or ():
            if "end" in message:
                self.stop(message["end"], message["code"])
            if "request" in message:
                self._take_request(message["request"], f"process {wire.number} ({wire.host})")
            if "topic" in message:
                with self._news:
                    said = self._told.setdefault(message["topic"], {})
                    said[wire.number] = message["facts"]
                    self._news.notify_all()

    def _lost(self, wire: Wire, how: str) -> None:
        line = f"process {wire.number} ({wire.host}) {how}; all others end here{self._remedy}"
        self.stop(line, EXIT_RETRY)

    def stop(self, line: str, code: int) -> None:
        """End the run from any thread: on all processes, if this is process 0."""
        if not self._finish():
            return
        if self.number == 0:
            # jax's service here is what the other processes need to end in peace.
            self._farewell(line, code)
        self._end(line, code)
        self._ended.set()


def _end(line: str, code: int) -> None:
    """End this process, whatever its other threads wait for; buffers of files are lost."""
    sys.stderr.write(f"k2jax: {line}\n")
    sys.stderr.flush()
    with contextlib.suppress(ValueError, OSError):
        sys.stdout.flush()
    os._exit(code)


def difference(said: list[Mapping[str, Any]], names: list[str]) -> str:
    """One line on who differs from the first, and in what; empty: nobody does."""
    first = said[0]
    for fact in dict.fromkeys(name for facts in said for name in facts):
        other = [i for i, facts in enumerate(said) if facts.get(fact) != first.get(fact)]
        if not other:
            continue
        who = ", ".join(names[i] for i in other[:4])
        who += f" and {len(other) - 4} more" if len(other) > 4 else ""
        facts = said[other[0]]
        more = [n for n in {**first, **facts} if first.get(n) != facts.get(n) and n != fact]
        also = f" (and in {', '.join(more[:3])}{', ...' if len(more) > 3 else ''})" if more else ""
        verb = "differs" if len(other) == 1 else "differ"
        return (
            f"{who} {verb} from {names[0]} in {fact}: {facts.get(fact)}, not {first.get(fact)}"
            f"{also}"
        )
    return ""


_ALONE = Group()
_current = _ALONE


def current() -> Group:
    """The group of the command that runs; a group of one outside of any."""
    return _current


@contextlib.contextmanager
def use(group: Group):
    """Make `group` the current one."""
    global _current  # noqa: PLW0603
    _current = group
    try:
        yield group
    finally:
        _current = _ALONE
