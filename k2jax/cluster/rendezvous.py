"""How processes find each other: all of them come to process 0, which waits for the last.

A newcomer says which process it is and sends a challenge. With a shared key, process 0 answers it
with a proof and a challenge of its own, and the newcomer answers that; each side goes on only with
one that has the key. Whoever is not welcome is dropped and counted.
"""

import contextlib
import ipaddress
import secrets
import selectors
import socket
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from k2jax.cluster.detect import ARRIVAL
from k2jax.cluster.key import KEY, KEY_FILE, is_proof, prove, read_key
from k2jax.cluster.wire import LONGEST, Message, Wire
from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.cluster.group import Group

EXIT_RETRY = 75  # exit code: not finished, and the same command goes on (EX_TEMPFAIL of sysexits.h)
GREETING = 30.0  # seconds that two sides have to greet each other
GUESTS = 256  # newcomers that may greet at once
LONGEST_GREETING = 4_096  # bytes of a newcomer's message


class Lost(RuntimeError):
    """Other processes did not come, or are gone; the same command may work the next time."""


class _Guest:
    """One connection to process 0, until it is welcome and after."""

    def __init__(self, connection: socket.socket, address: str):
        self.wire, self.address = Wire(connection), address
        self.wire.longest = LONGEST_GREETING
        self.until = time.monotonic() + GREETING
        self.hello: Message = {}
        self.challenge = secrets.token_hex(32)


def _facts(challenge: Any, hello: Message) -> list[Any]:
    """What both sides' proofs are about: process 0's challenge, and what the other one said."""
    return [challenge, *(hello.get(name) for name in ("challenge", "hello", "count", "host"))]


class _Door:
    """Process 0's port, until all others have come."""

    def __init__(self, group: "Group", coordinator: str, key: bytes | None):
        self.group, self.key = group, key
        self.listener = _listen(coordinator)
        self.ready = selectors.DefaultSelector()
        self.ready.register(self.listener, selectors.EVENT_READ)
        self.guests: list[_Guest] = []  # who greets, the oldest first

    def __enter__(self) -> "_Door":
        return self

    def __exit__(self, *error: object) -> None:
        for guest in self.guests:
            guest.wire.close()
        self.ready.close()
        self.listener.close()

    def serve(self) -> None:
        """Take what came within a moment: a newcomer, or words."""
        for key, _ in self.ready.select(0.2):
            if key.fileobj is self.listener:
                self._accept()
            elif key.data.wire.fileno() >= 0:  # not dropped a moment ago
                self._hear(key.data)
        while self.guests and self.guests[0].until < time.monotonic():
            self._refuse(self.guests[0], "it does not greet")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already, or there are too many files
            connection, address = self.listener.accept()
            guest = _Guest(connection, address[0])
            self.guests.append(guest)
            self.ready.register(guest.wire, selectors.EVENT_READ, guest)
        if len(self.guests) > max(GUESTS, 2 * self.group.count):
            # The oldest of the address that most come from: a flood displaces itself.
            (address, _), *_ = Counter(guest.address for guest in self.guests).most_common(1)
            self._refuse(next(g for g in self.guests if g.address == address), "too many come")

    def _hear(self, guest: _Guest) -> None:
        messages = guest.wire.receive()
        if messages is None:
            self._refuse(guest, "it goes before it is welcome")
        for message in messages or ():
            if guest.wire.number > 0:  # it is ahead of processes that are not here yet
                self.group.take(guest.wire, [message])
            elif not guest.hello:
                self._greet(guest, message)
            elif self._has_key(guest, message):
                self._admit(guest)
            else:
                self._refuse(guest, f"it does not prove the shared key ({KEY})")
            if guest.wire.fileno() < 0:
                return

    def _has_key(self, guest: _Guest, message: Message) -> bool:
        facts = _facts(guest.challenge, guest.hello)
        return self.key is not None and is_proof(message.get("proof"), self.key, "newcomer", *facts)

    def _greet(self, guest: _Guest, message: Message) -> None:
        if type(message.get("hello")) is not int or type(message.get("count")) is not int:
            self._refuse(guest, "it is no process of k2jax")
            return
        guest.hello = message
        if self.key is None:
            if message.get("challenge") is None:
                self._admit(guest)
            else:
                self._refuse(guest, f"it has a shared key and process 0 has none ({KEY})")
            return
        proof = prove(self.key, "process 0", *_facts(guest.challenge, message))
        guest.wire.send({"challenge": guest.challenge, "proof": proof})

    def _admit(self, guest: _Guest) -> None:
        """Give it its place, or say why it has none."""
        group, wire, number = self.group, guest.wire, guest.hello["hello"]
        wire.host = _printable(guest.hello.get("host"))
        if line := self._contradiction(number, guest.hello["count"], wire.host):
            wire.send({"end": line, "code": 2})
            self._refuse(guest, line)
            return
        wire.number, wire.longest = number, LONGEST
        self.guests.remove(guest)
        group.wires[number] = wire
        wire.send({"welcome": group.host})

    def _contradiction(self, number: int, count: int, host: str) -> str:
        group = self.group
        if count != group.count:
            return (
                f"process {number} ({host}) was started as one of {count} processes,"
                f" process 0 ({group.host}) as one of {group.count}"
            )
        if not 0 <= number < count:
            return f"a process says that it is number {number} of {count}: on {host}"
        if number in group.wires or number == 0:
            first = group.wires[number].host if number else group.host
            return f"two processes say that they are number {number}: on {first} and {host}"
        return ""

    def _refuse(self, guest: _Guest, why: str) -> None:
        """Drop a connection: a stranger's, or one of ours that may come again."""
        self.ready.unregister(guest.wire)
        guest.wire.close()
        if self.group.wires.get(guest.wire.number) is guest.wire:
            del self.group.wires[guest.wire.number]
            return
        self.guests.remove(guest)
        self.group.refused += 1
        if guest.hello and not self.group.refusal:  # one line, however many come
            self.group.refusal = why
            who = f"{guest.address}, which says that it is process {guest.hello['hello']}"
            _warn(f"refused {who}: {why}; further ones are counted only")


def accept_workers(group: "Group", coordinator: str) -> None:
    """Process 0: wait until all others have come.

    Raises:
        Lost: some did not.
        ConfigError: nobody can come here, or the key is none.
    """
    until = time.monotonic() + ARRIVAL
    key = read_key()
    if key is None and not is_loopback(coordinator):
        port = coordinator.rpartition(":")[2]
        _warn(
            f"port {port} is open to the network: whoever reaches it may take a process's place;"
            f" set {KEY} or {KEY_FILE} to the same secret on all hosts"
        )
    with _Door(group, coordinator, key) as door:
        while len(group.wires) < group.count - 1:
            if time.monotonic() > until:
                line = _missing(group, coordinator)
                group.fail(line, EXIT_RETRY)
                raise Lost(line)
            door.serve()


def _missing(group: "Group", coordinator: str) -> str:
    missing = [str(n) for n in range(1, group.count) if n not in group.wires]
    noun = "process" if len(missing) == 1 else "processes"
    refused = ""
    if group.refused:
        refused = f"; refused connections: {group.refused}"
        refused += f", the first process: {group.refusal}" if group.refusal else ""
    return (
        f"{noun} {', '.join(missing)} of {group.count} did not come to {coordinator}"
        f" within {ARRIVAL:.0f} s; see whether they run and can reach that address{refused}"
    )


def is_loopback(coordinator: str) -> bool:
    """Whether only processes of this machine can come to HOST:PORT."""
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(coordinator: str) -> socket.socket:
    host, _, port = coordinator.rpartition(":")
    # jax's service takes the port over while our connections on it stay open; so does a run that
    # is started again soon.
    own = host.strip("[]") if is_loopback(coordinator) else ""
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    try:
        if not own and socket.has_dualstack_ipv6():
            family = socket.AF_INET6
            return socket.create_server(
                ("", int(port)), family=family, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server((own, int(port)), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {coordinator}: {error.strerror}; is process 0 of"
            " another run there?"
        ) from None


def connect_to_coordinator(group: "Group", coordinator: str) -> None:
    """Any other process: reach process 0, and be welcome.

    Raises:
        Lost: it does not answer, or not as one that has our key.
        ConfigError: it says why there is no place for this process.
    """
    host, _, port = coordinator.rpartition(":")
    until, why, key = time.monotonic() + ARRIVAL, "no answer", read_key()
    while (left := until - time.monotonic()) > 0:
        try:
            wire = Wire(socket.create_connection((host.strip("[]"), int(port)), min(left, 10)))
        except OSError as error:
            why = error.strerror or str(error) or "no answer"
        else:
            why = _be_welcome(group, wire, key, min(until, time.monotonic() + GREETING))
            if not why:
                return
            wire.close()
        time.sleep(min(0.5, max(left, 0)))
    raise Lost(
        f"process {group.number} ({group.host}) cannot reach process 0 at {coordinator} within"
        f" {ARRIVAL:.0f} s ({why}); see whether it runs there and the port is open"
    )


def _be_welcome(group: "Group", wire: Wire, key: bytes | None, until: float) -> str:
    """Greet process 0. Why it did not work; empty: the group has its wire."""
    hello: Message = {"hello": group.number, "count": group.count, "host": group.host}
    hello["challenge"] = secrets.token_hex(32) if key else None
    wire.send(hello)
    trusted = key is None
    while time.monotonic() < until:
        messages = wire.receive()
        if messages is None:
            return "it closed the connection; an older run may still be there" + (
                ", or it has no shared key or another one" if key else ""
            )
        for place, message in enumerate(messages):
            if "proof" in message and not key:
                raise ConfigError(
                    f"process 0 asks for a shared key; set {KEY} or {KEY_FILE} for process"
                    f" {group.number} ({group.host}) as well"
                )
            if key and not trusted:
                facts = _facts(message.get("challenge"), hello)
                trusted = is_proof(message.get("proof"), key, "process 0", *facts)
                if not trusted:
                    return f"what answers there does not prove the shared key ({KEY})"
                wire.send({"proof": prove(key, "newcomer", *facts)})
            elif "end" in message:
                raise (ConfigError if message["code"] == 2 else Lost)(message["end"])
            elif "welcome" in message:
                wire.number, wire.host = 0, _printable(message["welcome"])
                group.wires[0] = wire
                group.take(wire, messages[place + 1 :])
                return ""
    return "it does not answer"


def _printable(host: Any) -> str:
    """A name from the network, as it may be shown."""
    return "".join(letter for letter in str(host)[:253] if letter.isprintable())


def _warn(line: str) -> None:
    sys.stderr.write(f"k2jax: {line}\n")
    sys.stderr.flush()
