"""How processes find each other: all of them come to process 0, which waits for the last."""

import selectors
import socket
import time
from typing import TYPE_CHECKING

from k2jax.cluster.detect import ARRIVAL
from k2jax.cluster.wire import Wire
from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.cluster.group import Group

EXIT_RETRY = 75  # exit code: not finished, and the same command goes on (EX_TEMPFAIL of sysexits.h)


class Lost(RuntimeError):
    """Other processes did not come, or are gone; the same command may work the next time."""


def accept_workers(group: "Group", coordinator: str) -> None:
    """Process 0: wait until all others have come."""
    until = time.monotonic() + ARRIVAL
    with _listener(coordinator) as door, selectors.DefaultSelector() as ready:
        ready.register(door, selectors.EVENT_READ)
        while len(group.wires) < group.count - 1:
            if time.monotonic() > until:
                missing = [str(n) for n in range(1, group.count) if n not in group.wires]
                noun = "process" if len(missing) == 1 else "processes"
                line = (
                    f"{noun} {', '.join(missing)} of {group.count} did not come to {coordinator}"
                    f" within {ARRIVAL:.0f} s; see whether they run and can reach that address"
                )
                group.fail(line, EXIT_RETRY)
                raise Lost(line)
            for key, _ in ready.select(0.2):
                if key.fileobj is door:
                    wire = Wire(door.accept()[0])
                    ready.register(wire, selectors.EVENT_READ, wire)
                else:
                    _hear(group, key.data, ready)


def _hear(group: "Group", wire: Wire, ready: selectors.BaseSelector) -> None:
    """One newcomer's first words, or its end."""
    messages = wire.receive()
    if messages is None:
        ready.unregister(wire)
        group.wires.pop(wire.number, None)  # it may come again
        wire.close()
    for message in messages or ():
        if "hello" not in message:
            if wire.number > 0:  # it is ahead of processes that are not here yet
                group.take(wire, [message])
            continue
        number, count = message["hello"], message.get("count")
        if not isinstance(number, int) or not isinstance(count, int):
            continue  # not one of ours
        wire.host = str(message.get("host"))
        line = ""
        if count != group.count:
            line = (
                f"process {number} ({wire.host}) was started as one of {count} processes,"
                f" process 0 ({group.host}) as one of {group.count}"
            )
        elif number in group.wires or number == 0:
            first = group.wires[number].host if number else group.host
            line = f"two processes say that they are number {number}: on {first} and {wire.host}"
        if line:
            wire.send({"end": line, "code": 2})
            group.fail(line, 2)
            raise ConfigError(line)
        wire.number = number
        group.wires[number] = wire
        wire.send({"welcome": group.host})


def _listener(coordinator: str) -> socket.socket:
    port = int(coordinator.rpartition(":")[2])
    # jax's service takes the port over while our connections on it stay open; so does a run that
    # is started again soon.
    try:
        return (
            socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
            if socket.has_dualstack_ipv6()
            else socket.create_server(("", port), backlog=1024)
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {coordinator}: {error.strerror}; is process 0 of"
            " another run there?"
        ) from None


def connect_to_coordinator(group: "Group", coordinator: str) -> None:
    """Any other process: reach process 0, and be welcome."""
    host, _, port = coordinator.rpartition(":")
    until, why = time.monotonic() + ARRIVAL, "no answer"
    hello = {"hello": group.number, "count": group.count, "host": group.host}
    while (left := until - time.monotonic()) > 0:
        try:
            wire = Wire(socket.create_connection((host.strip("[]"), int(port)), min(left, 10)))
        except OSError as error:
            why = error.strerror or str(error) or "no answer"
        else:
            wire.send(hello)
            if _answered(group, wire, until):
                return
            why = "it closed the connection; an older run may still be there"
        time.sleep(min(0.5, max(left, 0)))
    raise Lost(
        f"process {group.number} ({group.host}) cannot reach process 0 at {coordinator} within"
        f" {ARRIVAL:.0f} s ({why}); see whether it runs there and the port is open"
    )


def _answered(group: "Group", wire: Wire, until: float) -> bool:
    while time.monotonic() < until:
        messages = wire.receive()
        if messages is None:
            break
        for place, message in enumerate(messages):
            if "end" in message:
                raise (ConfigError if message["code"] == 2 else Lost)(message["end"])
            if "welcome" in message:
                wire.number, wire.host = 0, str(message["welcome"])
                group.wires[0] = wire
                group.take(wire, messages[place + 1 :])
                return True
    wire.close()
    return False
