"""Programs in sandboxes, from Python: what goes in, what came out, what ended them."""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.sandbox import seccomp

ZYGOTE = str(Path(__file__).with_name("zygote.py"))
GRACE = 2.0  # seconds that the report of an end may take


class SandboxError(ConfigError):
    """This machine cannot isolate programs, or the process that starts them has ended."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall: seconds by the clock.
        cpu: seconds of CPU, of each process.
        memory: bytes in memory, of all processes together.
        disk: bytes that can be written.
        processes: at once, threads of other processes included.
        output: bytes of standard output, and as many of standard error.
    """

    wall: float = 10.0
    cpu: int = 10
    memory: int = 1 << 30
    disk: int = 64 << 20
    processes: int = 32
    output: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "exited" or "signal" of itself; "timeout", "memory", "processes" or "output": the
            limit that ended it; "killed": by the system.
        code: exit code, or number of the signal; None where a limit ended it.
        finished: whether Python source was run to its last line: `sys.exit(0)`, `os._exit(0)` and
            threads that end the process leave it False.
        stdout: at most `Limits.output` bytes.
        stderr: the same.
        seconds: from request to end.
    """

    status: str
    code: int | None
    finished: bool
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def is_ok(self) -> bool:
        """Whether the program ended itself with exit code 0."""
        return self.status == "exited" and self.code == 0


class Sandbox:
    """Starts programs that see no network, no other process and no file but the system's.

    Each runs in namespaces of its own (processes, files, network, IPC), as a user without rights,
    behind a filter of system calls, within `Limits`; when it ends everything that it started is
    killed. Threads may call `run` at the same time.

    What it cannot do: Python code that is graded by other Python code in the same process can
    always fake the grade, if it goes looking for its grader. Grade by output where that matters.
    """

    def __init__(self, read_only: Sequence[str | Path] = (), isolated: bool = True):
        """Start the process that starts programs, and see that it can isolate them.

        Args:
            read_only: further folders that programs may read, at the same paths.
            isolated: False runs programs with limits only, as you: they can read your files, use
                the network and write wherever you can.

        Raises:
            SandboxError: programs cannot be isolated here; the line says why.
        """
        if sys.platform != "linux" or not seccomp.is_supported():
            machine = f"{sys.platform} on {platform.machine()}"
            raise SandboxError(
                f"programs can be isolated on Linux, x86-64 and ARM64; here: {machine}"
            )
        self._isolated = isolated
        prefix = Path(sys.base_prefix).resolve()
        needed = [] if prefix.is_relative_to("/usr") else [str(prefix)]
        paths = [*needed, *(str(Path(path).resolve()) for path in read_only)]
        options = json.dumps({"isolated": isolated, "read_only": paths})
        self._numbers = itertools.count(os.getpid() << 8)
        self._lock = threading.Lock()
        self._control, other = socket.socketpair()
        with other:
            self._zygote = subprocess.Popen(
                [sys.executable, "-I", "-S", ZYGOTE, str(other.fileno()), options],
                pass_fds=(other.fileno(),),
                env={},
                stdin=subprocess.DEVNULL,
            )
        answer = self._control.recv(4096).decode()
        if answer != "ready":
            self.close()
            raise SandboxError(
                f"programs cannot be isolated here: {answer or 'no answer'}; isolated=False runs"
                " them with limits only"
            )

    def run_python(self, program: str, stdin: str = "", limits: Limits = Limits()) -> Outcome:
        """Run Python source, with the standard library alone.

        Raises:
            SandboxError: it could not be started.
        """
        return self._run([], {"main.py": program}, stdin, limits)

    def run(
        self,
        argv: Sequence[str],
        files: Mapping[str, str] | None = None,
        stdin: str = "",
        limits: Limits = Limits(),
    ) -> Outcome:
        """Run a program of the system in an empty folder with these files.

        Args:
            argv: the program and its arguments; `node`, `gcc`, or a path.
            files: texts by file name, in the folder in which it starts.
            stdin: its standard input.
            limits: what it may use.

        Raises:
            SandboxError: it could not be started.
        """
        if not argv:
            raise ConfigError("argv is empty; name the program first")
        for name in files or {}:
            if "/" in name or name in ("", ".", ".."):
                raise ConfigError(f"files has {name!r}; names are without folders")
        return self._run(list(argv), dict(files or {}), stdin, limits)

    def _run(self, argv: list[str], files: dict[str, str], stdin: str, limits: Limits) -> Outcome:
        nowhere = contextlib.nullcontext("")
        with nowhere if self._isolated else tempfile.TemporaryDirectory() as folder:
            request = {
                "argv": argv,
                "main": "main.py",
                "files": files | {"stdin": stdin},
                "limits": dataclasses.asdict(limits),
                "folder": folder,
                "number": next(self._numbers),
                "token": secrets.token_hex(),
            }
            return self._exchange(request, limits)

    def _exchange(self, request: dict[str, Any], limits: Limits) -> Outcome:
        own, theirs = socket.socketpair()
        pipes = [os.pipe(), os.pipe()]
        try:
            with self._lock:
                socket.send_fds(self._control, [b"x"], [theirs.fileno(), *(w for _, w in pipes)])
        except OSError:
            raise SandboxError("the process that starts programs has ended") from None
        finally:
            theirs.close()
            for _, writing in pipes:
                os.close(writing)
        with own, _Reader([reading for reading, _ in pipes], limits.output) as reader:
            message = json.dumps(request).encode()
            own.sendall(len(message).to_bytes(8, "little") + message)
            return reader.collect(own, limits.wall + GRACE)

    def close(self) -> None:
        """End the process that starts programs, and with it all that run."""
        self._control.close()
        self._zygote.kill()
        self._zygote.wait()

    def __enter__(self) -> "Sandbox":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class _Reader:
    """Reads a program's two outputs up to a limit, and the report of its end."""

    def __init__(self, files: list[int], most: int):
        self._files, self._most = files, most
        self._output = {file: bytearray() for file in files}

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            os.close(file)

    def collect(self, connection: socket.socket, seconds: float) -> Outcome:
        """Read until the report is complete.

        Raises:
            SandboxError: the program could not be isolated, or nothing was reported in time.
        """
        report, full = bytearray(), False
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for file in (*self._files, connection.fileno()):
                selector.register(file, selectors.EVENT_READ)
            while not full and connection.fileno() in selector.get_map():
                left = began + seconds - time.monotonic()
                if left <= 0:
                    raise SandboxError(f"no report of a program's end after {seconds:.0f} s")
                for key, _ in selector.select(left):
                    part = os.read(key.fd, 65_536)
                    if not part:
                        selector.unregister(key.fileobj)
                    elif key.fd == connection.fileno():
                        report += part
                    else:
                        full |= self._keep(key.fd, part)
            for file in self._files:  # what was written before the end
                full |= self._drain(file)
        return self._outcome(bytes(report), full, time.monotonic() - began)

    def _keep(self, file: int, part: bytes) -> bool:
        output = self._output[file]
        output += part
        is_full = len(output) > self._most
        del output[self._most :]
        return is_full

    def _drain(self, file: int) -> bool:
        os.set_blocking(file, False)
        try:
            while part := os.read(file, 65_536):
                if self._keep(file, part):
                    return True
        except BlockingIOError:
            pass
        return False

    def _outcome(self, report: bytes, full: bool, seconds: float) -> Outcome:
        stdout, stderr = (bytes(self._output[file]) for file in self._files)
        if full:
            return Outcome("output", None, False, stdout, stderr, seconds)
        if not report:
            raise SandboxError("the process that watches a program has ended")
        end = json.loads(report)
        if end["status"] == "refused":
            raise SandboxError(f"a program cannot be isolated: {end['why']}")
        finished = end.get("finished", False)
        return Outcome(end["status"], end.get("code"), finished, stdout, stderr, end["seconds"])
