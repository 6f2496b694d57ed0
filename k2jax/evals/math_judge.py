r"""Whether two answers are the same mathematics, by `math-verify`, in a process of its own.

That package limits its time by signals, which only a main thread can take, and the algebra below
it can neither be interrupted nor bounded in memory. A process can: it is killed and started again.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import resource
import select
import subprocess
import sys
import threading

from k2jax.config import ConfigError

SECONDS = 10.0  # for one comparison
STARTING = 120.0  # for the packages to load, once
MEMORY = 4 << 30  # bytes of data
READY = "ready"


class Judge:
    """Compares answers; threads may share one."""

    def __init__(self, seconds: float = SECONDS):
        """Start nothing yet.

        Raises:
            ConfigError: `math-verify` is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "mathematics is graded by math-verify, which is not installed:"
                " pip install 'k2jax[eval]'"
            )
        self.version = f"math-verify {importlib.metadata.version('math-verify')}"
        self._seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def are_equal(self, target: str, answer: str) -> bool | None:
        """Whether two answers in LaTeX, unboxed, say the same; None: it took too long."""
        with self._lock:
            process = self._process or self._start()
            line = json.dumps([target, answer]) + "\n"
            with contextlib.suppress(OSError):
                process.stdin.write(line)  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                reply = self._read_line(process, self._seconds)
                if reply is not None:
                    return reply == "true"
            self._stop()
            return None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "k2jax.evals.math_judge"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        if self._read_line(self._process, STARTING) != READY:
            self._stop()
            raise ConfigError("math-verify cannot be loaded: python -c 'import math_verify'")
        return self._process

    def _read_line(self, process: subprocess.Popen[str], seconds: float) -> str | None:
        # The other side writes one line for each that it reads, at once: none is half there.
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        return process.stdout.readline().strip() or None

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process = None


def _serve() -> None:
    """Answer lines until there are no more: ["TARGET", "ANSWER"] by true or false."""
    import math_verify

    logging.disable(logging.WARNING)  # it warns that its own limit of time is off
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    print(READY, flush=True)  # noqa: T201, the other process reads it
    for line in sys.stdin:
        target, answer = (f"\\boxed{{{text}}}" for text in json.loads(line))
        try:
            gold = math_verify.parse(target, parsing_timeout=None)
            mine = math_verify.parse(answer, parsing_timeout=None)
            equal = bool(math_verify.verify(gold, mine, timeout_seconds=None))
        except Exception:
            equal = False  # what cannot be read as mathematics is not the same
        print(json.dumps(equal), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()
