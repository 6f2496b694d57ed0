"""Files of a run that outlive a kill, and a disk that is full for a while."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

# What a user can put right, where the program is not at fault.
OUTSIDE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOENT, errno.ENOTDIR, errno.ESTALE,
)  # fmt: skip


def replace(path: Path, content: str | bytes) -> None:
    """Write a file that is the old one or the new one at any moment; text as UTF-8."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Lines:
    """Appends to a file; what cannot be written now is kept and written with the next line."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        """`say` is told once when writing begins to fail, and when it works again."""
        self.path, self.say = path, say
        self.waiting = b""
        self.failed = False
        self.file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """One line, without its end; it is with the system when this returns, or waits."""
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
        """Say what is lost, if anything is."""
        self.file.close()
        if self.waiting:
            lost = self.waiting.count(b"\n")
            self.say(f"{self.path} could not be written: its last {lost} lines are lost")


def default_cache() -> Path:
    """$K2JAX_CACHE, else $XDG_CACHE_HOME/k2jax, else ~/.cache/k2jax."""
    if chosen := os.environ.get("K2JAX_CACHE"):
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "k2jax"
