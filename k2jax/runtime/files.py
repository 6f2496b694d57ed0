"""The one way to write files that survive a kill: whole or not at all, locked, appended to."""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

# What a user can put right, where the program is not at fault.
OUTSIDE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ESTALE,
)


@contextlib.contextmanager
def open_atomic(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that becomes `path` when the block ends without an error.

    Until then, and after an error, `path` is what it was. A process that is killed leaves
    `.<name>.<process>.<thread>`.

    Args:
        path: of the file; its folder exists.
        durable: wait until the content is on the disk, so that a power cut cannot empty the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            yield file
        rename_durably(temporary, path) if durable else temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes | memoryview, durable: bool = False) -> None:
    """Write a file that is the old one or the new one at any moment; text as UTF-8.

    Args:
        path: as for `open_atomic`.
        content: of the whole file.
        durable: as for `open_atomic`.
    """
    with open_atomic(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def rename_durably(temporary: Path, path: Path) -> None:
    """Give a file or a flat folder its final name, once its content is on the disk.

    Raises:
        OSError: also where `path` is a folder that is not empty.
    """
    for part in temporary.iterdir() if temporary.is_dir() else [temporary]:
        with part.open("rb") as file:
            os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block; the system frees it when the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


class Lines:
    """Appends to a file; what cannot be written now is kept and written with the next line."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        """Report to `say` once when writing starts to fail, and when it works again."""
        self.path, self.say = path, say
        self.waiting = b""
        self.failed = False
        self.file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Write one line, without its end; the system has it when this returns, or it waits."""
        self.waiting += line.encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not self.failed:
                self.say(f"{self.path} cannot be written ({error.strerror}); its lines are kept")
            self.failed = True
            return
        if self.failed:
            self.say(f"{self.path} can be written again; no line is lost")
        self.failed = False

    def close(self) -> None:
        """Close the file and report what is lost, if anything is."""
        self.file.close()
        if self.waiting:
            lost = self.waiting.count(b"\n")
            self.say(f"{self.path} could not be written: its last {lost} lines are lost")


def default_cache() -> Path:
    """Return $K2JAX_CACHE, else $XDG_CACHE_HOME/k2jax, else ~/.cache/k2jax."""
    if chosen := os.environ.get("K2JAX_CACHE"):
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "k2jax"
