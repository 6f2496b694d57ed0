"""`python flood.py HOST PORT`: strangers at a port, hundreds a second, until the process is ended.

Some are silent, some speak HTTP, HTTP/2 as jax's service does, or JSON, and some say that they are
processes of the run: with numbers that cannot be, that are taken, or without the key.
"""

import contextlib
import itertools
import json
import socket
import sys
import time

HELLOS = (
    {"hello": 99, "count": 4},
    {"hello": True, "count": 4},
    {"hello": 1, "count": 9},
    {"hello": 1, "count": 4, "host": "stranger", "challenge": "0" * 64},
    {"hello": 2, "count": 4, "host": "stranger", "challenge": None},
    {"end": "the stranger says so", "code": 2},
    {"topic": "settings", "facts": {}},
)
WORDS = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
    b"\xff" * 70_000,
    b"[" * 5_000 + b"\n",
    *(json.dumps(hello).encode() + b"\n" for hello in HELLOS),
    b'{"hello": 3, "count": 4, "challenge": "0"}\n{"proof": "' + b"0" * 64 + b'"}\n',
]


def main() -> None:
    address, held = (sys.argv[1], int(sys.argv[2])), []
    for words in itertools.cycle(WORDS):
        time.sleep(0.003)
        with contextlib.suppress(OSError):
            connection = socket.create_connection(address, 1)
            held.append(connection)
            connection.setblocking(False)
            connection.send(words)
        while len(held) > 300:  # their other end has given up, or will
            held.pop(0).close()


if __name__ == "__main__":
    main()
