"""This process's memory: how much it holds, what it keeps for reuse, and giving back the rest."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")  # sizes of this process in pages
# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
BLOCK = 2**20
ARENAS = 1


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def limit_malloc_arenas() -> None:
    """Let arrays go back to the system when freed; nothing happens where libc is not glibc's.

    By itself glibc raises the size from which it does so to 32 MiB, and smaller arrays then leave
    holes in its heaps: a run of `tiny` grew by 15% in 500 steps. With a heap for each of a save's
    new threads, memory creeps up by half a megabyte a save.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, BLOCK)
    _glibc("mallopt", M_ARENA_MAX, ARENAS)


class Reserve:
    """A block of the heap that is lent to the temporaries of each step, and kept in between.

    XLA takes and frees all temporaries of a step on CPU, half a gigabyte for `tiny`, as one block a
    device. Mapped anew by every step they cost a sixth of its time in page faults. In between the
    block is taken, so that no save or score leaves arrays in it. Where libc is not glibc's, nothing
    happens. Call `limit_malloc_arenas` before jax starts: only the first heap holds large blocks.
    """

    def __init__(self, size: int):
        """Take `size` bytes, which are in memory once they are used; 0: none."""
        libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
        self.libc: Any = libc if size and hasattr(libc, "mallopt") else None
        self.block: int | None = None
        # Aligned blocks need a few bytes more than they leave free, and small arrays may stay.
        self.size = size + size // 4
        if self.libc is not None:
            self.libc.malloc.restype = ctypes.c_void_p
            self.libc.malloc.argtypes = [ctypes.c_size_t]
            self.libc.free.argtypes = [ctypes.c_void_p]
            with self.lend():
                pass

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Within the block, arrays of any size are taken from the heap, this memory among it."""
        if self.libc is None:
            yield
            return
        self.libc.mallopt(M_TRIM_THRESHOLD, -1)  # never; its largest int is no more than 2 GiB
        self.libc.mallopt(M_MMAP_MAX, 0)
        self.libc.free(self.block)
        try:
            yield
        finally:
            self._take_back()

    def close(self) -> None:
        """Give the memory back to the system."""
        if self.libc is not None:
            self.libc.free(self.block)
            self.block = None
            trim_malloc()

    def _take_back(self) -> None:
        before, self.block = self.block, self.libc.malloc(self.size)
        self.libc.mallopt(M_TRIM_THRESHOLD, 2**17)  # glibc's defaults
        self.libc.mallopt(M_MMAP_MAX, 2**16)
        if before != self.block:  # another thread left something where it was
            trim_malloc()


def trim_malloc() -> None:
    """Give back what was freed in small pieces.

    It is 0.75 GB of what compiling `tiny` takes, and 100 MB after a save of 160 MB.
    """
    _glibc("malloc_trim", 0)


def _glibc(function: str, *args: int) -> None:
    call = getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None
    if call is not None:
        call(*args)
