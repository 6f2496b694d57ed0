"""From the socket to the last answer: a first signal drains, a second one ends at once.

In several processes that holds for a signal to any of them: process 0 hears of it from the others,
and all end when it has answered what runs.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from k2jax.cluster import Group
from k2jax.config import ConfigError
from k2jax.serve.app import make_app
from k2jax.serve.service import Service

BACKLOG = 2048
DRAIN = "drain"  # what the other processes ask of process 0


class Server(uvicorn.Server):
    """uvicorn's server, which answers running requests before it ends."""

    def __init__(
        self, service: Service, config: uvicorn.Config, on_start: Callable[[], None] | None
    ):
        super().__init__(config)
        self._service, self._on_start = service, on_start
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Catch none: `run` does, and until the engine is empty."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; end at once when this comes again."""
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + sig)
        self.drain()

    def drain(self, asked: str = "") -> None:
        """Take no more requests, and end when the running ones are answered.

        Args:
            asked: the process that got the signal, where it is another one.
        """
        if not self._service.draining:
            self._service.draining = True
            why = f" ({asked} got a signal)" if asked else ""
            self._service.write_log(
                f"draining{why}: running requests are answered, new ones refused"
            )
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; clients are refused until the server listens at it.

    Args:
        host: a name or an address.
        port: 0: any that is free.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot serve at {host}:{port}: {why}") from None
    return bound


def make_server(service: Service, on_start: Callable[[], None] | None = None) -> Server:
    """A server that nothing was asked of yet; `on_start` is called once it listens."""
    config = uvicorn.Config(
        make_app(service),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=30,
        ws="none",
        h11_max_incomplete_event_size=64 * 2**10,
    )
    return Server(service, config, on_start)


def run(
    service: Service,
    bound: socket.socket,
    on_start: Callable[[], None],
    group: Group | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal, then answer what runs and return.

    Args:
        service: the model and its rules.
        bound: from `bind`.
        on_start: called once clients can connect.
        group: of processes, this one first; a signal to any of them counts.
        finish: called after the last answer, while signals are still caught.
    """
    server = make_server(service, on_start)
    with bound, _catching((signal.SIGTERM, signal.SIGINT), server.handle_exit):
        if group is not None:
            group.on_request(DRAIN, server.drain)
        server.run(sockets=[bound])
        if finish is not None:
            finish()


@contextlib.contextmanager
def pass_signals_on(group: Group, log: Callable[[str], None]) -> Iterator[None]:
    """Around all that another process than the first one computes: a signal makes all drain.

    Args:
        group: of this process.
        log: gets one line on why this process ends.
    """
    signals: list[int] = []

    def handle(sig: int, frame: FrameType | None) -> None:
        signals.append(sig)
        if len(signals) > 1:
            os._exit(128 + sig)
        log("draining: process 0 answers running requests and refuses new ones, then all end")
        # In a thread: this one may be sending, and then has the lock of the connection.
        threading.Thread(target=group.request, args=(DRAIN,)).start()

    with _catching((signal.SIGTERM, signal.SIGINT), handle):
        yield
        if not signals:
            log("process 0 has drained; all end")


@contextlib.contextmanager
def _catching(
    numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Catch signals in the main thread; elsewhere nothing can be caught."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def serve_in_thread(service: Service, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve from a thread, for notebooks and tests; the block has the server's URL."""
    bound = bind(host, 0)
    server = make_server(service)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        _wait(lambda: server.started or not thread.is_alive())
        yield f"http://{host}:{bound.getsockname()[1]}"
    finally:
        server.drain()
        thread.join()
        bound.close()


def _wait(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not is_so():
        pause.wait(0.01)
