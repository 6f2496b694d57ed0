"""Programs in sandboxes, from Python: what goes in, what came out, what ended them."""

import contextlib
import dataclasses
import itertools
import json
import marshal
import os
import platform
import secrets
import select
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
        cpu: seconds of CPU, of each process; SIGXCPU ends it.
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

    Each runs in namespaces apart (processes, files, network, IPC), as a user without rights, behind
    a filter of system calls, within `Limits`; when it ends everything that it started is killed.
    Threads may call `run` at the same time; each gets a worker, which then waits for the next.

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
        self._lock, self._is_closed = threading.Lock(), False
        self._idle: list[socket.socket] = []  # connections to workers
        self._busy: set[socket.socket] = set()
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
                "files": files | ({"stdin": stdin} if stdin else {}),
                "limits": dataclasses.asdict(limits),
                "folder": folder,
                "number": next(self._numbers),
                "token": secrets.token_hex(),
            }
            return self._exchange(request, limits)

    def _exchange(self, request: dict[str, Any], limits: Limits) -> Outcome:
        worker = self._take_worker()
        is_free = False
        try:
            pipes = [os.pipe(), os.pipe()]
            with _Reader([reading for reading, _ in pipes], limits.output) as reader:
                try:
                    _send(worker, request, [writing for _, writing in pipes])
                finally:
                    for _, writing in pipes:
                        os.close(writing)
                report = reader.collect(worker, limits.wall + GRACE)
                is_free = not report.get("is_last", True)
                return reader.make_outcome(report, request["token"])
        except OSError:
            raise SandboxError("the process that runs programs has ended") from None
        finally:
            self._put_worker(worker, is_free)

    def _take_worker(self) -> socket.socket:
        """A connection to a worker that waits, or to a new one."""
        with self._lock:
            if self._is_closed:
                raise SandboxError(
                    "the sandbox is closed: the process that runs programs has ended"
                )
            if self._idle:
                own = self._idle.pop()
            else:
                own, theirs = socket.socketpair()
                try:
                    socket.send_fds(self._control, [b"x"], [theirs.fileno()])
                except OSError:
                    own.close()
                    raise SandboxError("the process that starts programs has ended") from None
                finally:
                    theirs.close()
            self._busy.add(own)
            return own

    def _put_worker(self, worker: socket.socket, is_free: bool) -> None:
        with self._lock:
            self._busy.discard(worker)
            if is_free and not self._is_closed:
                self._idle.append(worker)
            else:
                worker.close()

    def close(self) -> None:
        """End the processes that start and run programs, and with them all that run."""
        with self._lock:
            self._is_closed = True
            for worker in self._idle:
                worker.close()
            for worker in self._busy:  # its thread closes it
                worker.shutdown(socket.SHUT_RDWR)
            self._idle.clear()
        self._control.close()
        self._zygote.kill()
        self._zygote.wait()

    def __enter__(self) -> "Sandbox":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _send(worker: socket.socket, request: dict[str, Any], outputs: list[int]) -> None:
    """Hand a program to a worker, which reads no more of it than its limits."""
    file = os.memfd_create("request")
    try:
        with open(file, "wb", closefd=False) as out:
            out.write(marshal.dumps(request))  # both sides are one interpreter
        os.lseek(file, 0, os.SEEK_SET)
        socket.send_fds(worker, [json.dumps(request["limits"]).encode()], [file, *outputs])
    finally:
        os.close(file)


class _Reader:
    """Reads a program's two outputs up to a limit, and the report of its end."""

    def __init__(self, files: list[int], most: int):
        self._files, self._most = files, most
        self._output = {file: bytearray() for file in files}
        self._is_full = False

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            os.close(file)

    def collect(self, worker: socket.socket, seconds: float) -> dict[str, Any]:
        """Read until the report is there, or an output is too long; {} for the latter.

        Raises:
            SandboxError: the program could not be isolated, or nothing was reported in time.
        """
        end = time.monotonic() + seconds
        poll = select.poll()
        for file in (*self._files, worker.fileno()):
            poll.register(file, select.POLLIN)
        while not self._is_full:
            left = end - time.monotonic()
            if left <= 0:
                raise SandboxError(f"no report of a program's end after {seconds:.0f} s")
            ready = {file for file, _ in poll.poll(1e3 * left)}
            for file in ready & self._output.keys():
                if not self._read(file):
                    poll.unregister(file)
            if worker.fileno() in ready:
                return self._read_report(worker)
        return {}

    def _read_report(self, worker: socket.socket) -> dict[str, Any]:
        report = worker.recv(1 << 16)
        if not report:
            raise SandboxError("the process that runs a program has ended")
        for file in self._files:  # what was written before the end; nobody writes any more
            while self._read(file):
                pass
        return dict(json.loads(report))

    def _read(self, file: int) -> bool:
        """Take what is there, up to the limit; False at the end."""
        part = os.read(file, 65_536)
        output = self._output[file]
        output += part
        self._is_full |= len(output) > self._most
        del output[self._most :]
        return bool(part)

    def make_outcome(self, report: dict[str, Any], token: str) -> Outcome:
        """What was read, with how the program ended.

        Raises:
            SandboxError: it was not started.
        """
        stdout, stderr = (bytes(self._output[file]) for file in self._files)
        if self._is_full:
            return Outcome("output", None, False, stdout, stderr, report.get("seconds", 0.0))
        if report["status"] == "refused":
            raise SandboxError(f"a program cannot be isolated: {report['why']}")
        finished = secrets.compare_digest(report["finished"], token)
        status, seconds = report["status"], report["seconds"]
        return Outcome(status, report.get("code"), finished, stdout, stderr, seconds)
