"""Size and CRC-32 of every file of a checkpoint, recorded before its folder appears.

The storage format has checksums for its indices, none for numbers: a flipped bit of a weight would
be restored as another weight. Each process sums up the files it wrote while the save is still in
the background, and process 0 all others; the sums end in one `files.json`.
"""

import errno
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from k2jax.checkpoint.restorable import describe_unreadable
from k2jax.checkpoint.steps import TEMPORARY
from k2jax.config import ConfigError

RECORD = "files.json"
OWN = "files.{}.json"
BLOCK = 2**24
READERS = 4
LINE = 200  # bytes of a message from one process to the others
NEWEST = 64  # steps that process 0 sends to the others

# Bytes and CRC-32 by the name of the file.
Sums = dict[str, list[int]]


def record_files(handler: Any) -> None:
    """Make a composite handler of orbax record and read what it wrote, before the step appears."""
    start, finish = handler.async_save, handler.finalize

    async def async_save(directory: epath.Path, args: Any) -> list[Any]:
        writes = await start(directory, args) or []
        return [*writes, _Own(writes, directory)] if jax.process_count() > 1 else writes

    def finalize(directory: epath.Path) -> None:
        finish(directory)  # joins the processes' databases and names the parts
        _record(directory)
        # The sums are of what was read from the files just now: once is enough.
        if why := describe_damage(directory, sums=False) or describe_unreadable(directory):
            raise ConfigError(f"what was written cannot be read again: {why}")

    handler.async_save, handler.finalize = async_save, finalize


class _Own:
    """A future of orbax: this process has written its files, and knows their sums."""

    def __init__(self, writes: list[Any], directory: epath.Path):
        self.writes, self.directory = writes, directory

    def result(self, timeout: float | None = None) -> None:
        for write in self.writes:
            write.result(timeout=timeout)
        number = jax.process_index()
        own = f"ocdbt.process_{number}"
        sums = {
            name: sums
            for folder in self.directory.iterdir()
            if folder.is_dir() and (folder / own).is_dir()
            for name, sums in _sum_files(folder / own, f"{_part(folder)}/{own}/").items()
        }
        (self.directory / OWN.format(number)).write_text(json.dumps(sums))

    def cancel(self) -> None:
        """Do nothing: orbax cancels all futures, and this one holds no work."""


def _part(folder: epath.Path) -> str:
    return folder.name.split(TEMPORARY)[0]


def _record(directory: epath.Path) -> None:
    known: Sums = {}
    for number in range(jax.process_count()):
        own = directory / OWN.format(number)
        if own.exists():
            known |= json.loads(own.read_text())
            own.unlink()
    for folder in directory.iterdir():
        if folder.is_dir():
            known |= _sum_files(folder, f"{_part(folder)}/", known)
    (directory / RECORD).write_text(json.dumps(known, indent=0))


def _sum_files(folder: epath.Path, prefix: str, known: Iterable[str] = ()) -> Sums:
    """Return the sums of all files below a folder, by `prefix` and path, without those known."""
    sums: Sums = {}
    for path in folder.iterdir():
        if path.is_dir():
            sums |= _sum_files(path, f"{prefix}{path.name}/", known)
        elif prefix + path.name not in known:
            sums[prefix + path.name] = _sum_file(path)
    return sums


def _sum_file(path: epath.Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def describe_damage(
    path: epath.Path,
    parts: Iterable[str] = (),
    share: tuple[int, int] = (0, 1),
    sums: bool = True,
) -> str:
    """Return what is wrong with the files of a step; empty: nothing, or they have no record.

    Args:
        path: the step's folder.
        parts: names of the folders to look into; none: all.
        share: (i, n) reads every n-th file from the i-th on.
        sums: compare what the files hold, not their sizes alone.
    """
    if not (path / RECORD).exists():
        return ""
    try:
        record: Sums = json.loads((path / RECORD).read_text())
        wanted = {name: tuple(sums) for name, sums in sorted(record.items())}
    except (ValueError, AttributeError, TypeError):
        return f"{RECORD} is not readable"
    parts = tuple(parts)
    names = [name for name in wanted if not parts or name.split("/")[0] in parts]
    names = names[share[0] :: share[1]]

    def check(name: str) -> str:
        size, checksum = wanted[name]
        return _check_file(path / name, size, checksum, sums)

    with ThreadPoolExecutor(READERS) as pool:
        looks = pool.map(check, names)
        return next((f"{name} {why}" for name, why in zip(names, looks, strict=True) if why), "")


def _check_file(path: epath.Path, size: int, checksum: int, sums: bool) -> str:
    try:
        actual = path.stat().length
        if actual != size:
            return f"has {actual:,} bytes, not {size:,}"
        same = not sums or _sum_file(path) == [size, checksum]
        return "" if same else "has other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if error.errno == errno.EIO:  # others, a missing permission say, are no damage
            return f"cannot be read ({error.strerror})"
        raise


def broadcast_steps(listed: list[int]) -> list[int]:
    """Return to all processes what process 0 lists: listings of network folders may be stale."""
    if jax.process_count() == 1:
        return listed
    from jax.experimental import multihost_utils

    newest = np.full(NEWEST, -1, np.int32)
    newest[: len(listed[-NEWEST:])] = listed[-NEWEST:]
    received = np.asarray(multihost_utils.broadcast_one_to_all(newest))
    return [int(step) for step in received if step >= 0]


def first_error_across_processes(text: str) -> str:
    """Return to all processes the first text that is not empty, in the order of processes."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    own = np.frombuffer(text.encode()[:LINE].ljust(LINE, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, LINE)
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
    return next(filter(None, texts), "")
