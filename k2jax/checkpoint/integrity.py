"""What the bytes of a checkpoint were: size and CRC-32 of every file, recorded before it appears.

The storage has checksums for its indices, none for numbers: a flipped bit of a weight would be
restored as another weight. Each process sums up the files it wrote while the save is still in the
background, and the first one everything else; all end in one `files.json`.
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

from k2jax.checkpoint.steps import TEMPORARY

RECORD = "files.json"
OWN = "files.{}.json"
BLOCK = 2**24
READERS = 4
LINE = 200  # bytes of a message from one process to the others
NEWEST = 64  # steps that a process tells the others of

# Bytes and CRC-32 by the name of the file.
Sums = dict[str, list[int]]


def guard(handler: Any) -> None:
    """Make a composite handler of orbax record what it wrote, before the step's folder appears."""
    start, finish = handler.async_save, handler.finalize

    async def async_save(directory: epath.Path, args: Any) -> list[Any]:
        writes = await start(directory, args) or []
        return [*writes, _Own(writes, directory)] if jax.process_count() > 1 else writes

    def finalize(directory: epath.Path) -> None:
        finish(directory)  # joins the processes' databases and names the parts
        _record(directory)

    handler.async_save, handler.finalize = async_save, finalize


class _Own:
    """A future of orbax: this process has written its files, and knows their sums."""

    def __init__(self, writes: list[Any], directory: epath.Path):
        self.writes, self.directory = writes, directory

    def result(self, timeout: float | None = None) -> None:
        for write in self.writes:
            write.result(timeout=timeout)
        number = jax.process_index()
        mine = f"ocdbt.process_{number}"
        sums = {
            name: sums
            for folder in self.directory.iterdir()
            if folder.is_dir() and (folder / mine).is_dir()
            for name, sums in _sums(folder / mine, f"{_part(folder)}/{mine}/").items()
        }
        (self.directory / OWN.format(number)).write_text(json.dumps(sums))

    def cancel(self) -> None:
        """There is nothing to stop; orbax asks all futures."""


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
            known |= _sums(folder, f"{_part(folder)}/", known)
    (directory / RECORD).write_text(json.dumps(known, indent=0))


def _sums(folder: epath.Path, prefix: str, known: Iterable[str] = ()) -> Sums:
    """Of all files below, by `prefix` and the path from `folder`, without those known."""
    found: Sums = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= _sums(path, f"{prefix}{path.name}/", known)
        elif prefix + path.name not in known:
            found[prefix + path.name] = _sum(path)
    return found


def _sum(path: epath.Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def damage(path: epath.Path, parts: Iterable[str] = (), share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the files of a step; empty: nothing, or there is no record of them.

    Args:
        path: the step's folder.
        parts: names of the folders to look into; none: all.
        share: (i, n) reads every n-th file from the i-th on.
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
    with ThreadPoolExecutor(READERS) as pool:
        looks = pool.map(lambda name: _look(path / name, *wanted[name]), names)
        return next((f"{name} {why}" for name, why in zip(names, looks, strict=True) if why), "")


def _look(path: epath.Path, size: int, checksum: int) -> str:
    try:
        found = path.stat().length
        if found != size:
            return f"has {found:,} bytes, not {size:,}"
        return "" if _sum(path) == [size, checksum] else "has other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if error.errno == errno.EIO:  # others, a missing permission say, are no damage
            return f"cannot be read ({error.strerror})"
        raise


def steps_of_all(found: list[int]) -> list[int]:
    """What process 0 lists, told to all: listings of network folders may be old."""
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    newest = np.full(NEWEST, -1, np.int32)
    newest[: len(found[-NEWEST:])] = found[-NEWEST:]
    told = np.asarray(multihost_utils.broadcast_one_to_all(newest))
    return [int(step) for step in told if step >= 0]


def agree(text: str) -> str:
    """What some process has to say, told to all; the first of several."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode()[:LINE].ljust(LINE, b"\0"), np.uint8)
    told = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, LINE)
    found = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in told]
    return next(filter(None, found), "")
