"""JSON lines between two processes."""

import json
import socket
import threading
import time
from typing import Any

LONGEST = 1 << 22  # bytes of one message: no honest one comes near
SEND = 10.0  # seconds until a full connection counts as broken

Message = dict[str, Any]


class Wire:
    """One connection. Any thread may send, one reads."""

    def __init__(self, connection: socket.socket):
        """`connection` is ours from now on."""
        self.connection = connection
        connection.settimeout(SEND)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.heard = time.monotonic()
        self.number, self.host = -1, ""  # who is at the other end, once it is known
        self.longest = LONGEST
        self._rest = b""
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """For selectors."""
        return self.connection.fileno()

    def send(self, message: Message) -> bool:
        """Whether it went out."""
        try:
            with self._lock:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """What has come, maybe nothing yet; None: the other end is gone, or speaks no JSON."""
        try:
            content = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._rest = (self._rest + content).split(b"\n")
        if not content or len(self._rest) > self.longest:
            return None
        self.heard = time.monotonic()
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return found if all(isinstance(message, dict) for message in found) else None

    def close(self) -> None:
        """End the connection."""
        self.connection.close()
