"""Streams of documents in ArrayRecord files, written once and read anywhere.

A record is RECORD words of the stream (`k2jax.data.stream`, uint32, little-endian), the last one of
a file fewer; a file begins with a document. So a row costs the same wherever it lies, in documents
of ten tokens or of a million, and a host reads no more than the records of its rows. The lengths of
a file's documents are beside it (`.lengths.npy`, uint32), for those who need whole documents.
"""

import functools
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2jax.config import ConfigError, one_line
from k2jax.data.optional import import_optional
from k2jax.data.store import Store
from k2jax.data.stream import ID, PADDING, UNSCORED
from k2jax.runtime.files import rename_durably

RECORD = 4_096
SUFFIX = ".arrayrecord"
OPEN = 256  # files held open
DTYPE = np.dtype("<u4")
# Each record by itself, since rows are read in random order.
_WRITE = "group_size:1,zstd:1"
_READ = "readahead_buffer_size:0,max_parallelism:0"


class Shard(NamedTuple):
    """A file of a stream: its name in the folder, its tokens, its size in bytes."""

    file: str
    tokens: int
    size: int


class ShardWriter:
    """Writes documents into one file, which is there when `close` has returned."""

    def __init__(self, path: Path):
        """Begin the file under another name."""
        self.path, self.tokens = path, 0
        self._temporary = path.with_name(f".{path.name}")
        self._writer = array_record().ArrayRecordWriter(os.fsencode(self._temporary), _WRITE)
        self._waiting: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._count = 0

    def add(self, words: np.ndarray) -> None:
        """Append one document."""
        self._waiting.append(words)
        self._lengths.append(len(words))
        self._count += len(words)
        if self._count >= 16 * RECORD:
            self._flush(self._count // RECORD * RECORD)

    def close(self) -> Shard | None:
        """Finish the file; None, and no file, where there were no documents."""
        self._flush(self._count)
        self._writer.close()
        if not self.tokens:
            self._temporary.unlink()
            return None
        lengths = lengths_of(self._temporary)
        np.save(lengths, np.array(self._lengths, np.uint32))
        rename_durably(lengths, lengths_of(self.path))
        rename_durably(self._temporary, self.path)
        return Shard(self.path.name, self.tokens, self.path.stat().st_size)

    def _flush(self, count: int) -> None:
        words = np.concatenate([*self._waiting, np.zeros(0, np.uint32)]).astype(DTYPE)
        for start in range(0, count, RECORD):
            self._writer.write(words[start : min(start + RECORD, count)].tobytes())
        self._waiting, self._count = [words[count:]], len(words) - count
        self.tokens += count


class Shards:
    """A stream of documents over several files. One thread may read it at a time."""

    def __init__(self, folder: Path, shards: Sequence[Shard], whole: bool = False):
        """Name the files; they are opened when their turn comes.

        Args:
            folder: where they are.
            shards: in the order of the stream.
            whole: whether documents are laid into rows whole.

        Raises:
            ConfigError: one is missing, or has another size than when it was written.
        """
        self.whole = whole
        self.paths = [folder / shard.file for shard in shards]
        for path, shard in zip(self.paths, shards, strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size:
                state = "is missing" if size is None else f"has {size} bytes"
                raise ConfigError(f"{path} {state}; {shard.size} were written: make {folder} anew")
        self.starts = np.cumsum([0] + [shard.tokens for shard in shards])
        self._readers: OrderedDict[int, Any] = OrderedDict()

    @property
    def size(self) -> int:
        """How many tokens."""
        return int(self.starts[-1])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins, and the end, int64 [documents + 1].

        Raises:
            ConfigError: a file of lengths is missing or damaged.
        """
        all_lengths = [np.zeros(1, np.int64)]
        for path, tokens in zip(self.paths, np.diff(self.starts), strict=True):
            file = lengths_of(path)
            try:
                lengths = np.load(file, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ConfigError(f"{file} is missing or damaged: {one_line(error)}") from None
            if lengths.sum(dtype=np.int64) != tokens:
                raise ConfigError(f"{file} does not add up to the {tokens} tokens of {path.name}")
            all_lengths.append(lengths.astype(np.int64))
        return np.cumsum(np.concatenate(all_lengths))

    def cut(self, begin: np.ndarray, length: int) -> np.ndarray:
        """Stretches of the stream; see `k2jax.data.stream.Stream`.

        Raises:
            ConfigError: a file is damaged.
        """
        words = np.full((len(begin), length), PADDING)
        pieces = [
            (row, *piece)
            for row, first in enumerate(begin.tolist())
            for piece in self._pieces(first, length)
        ]
        wanted: dict[int, dict[int, Any]] = {}
        for _, _, shard, record, _, _ in pieces:
            wanted.setdefault(shard, {})[record] = None
        for shard, records in wanted.items():
            wanted[shard] = dict(zip(records, self._read(shard, list(records)), strict=True))
        for row, at, shard, record, low, high in pieces:
            content = np.frombuffer(wanted[shard][record], DTYPE)
            words[row, at : at + high - low] = content[low:high]
        return words

    def store(self, lengths: np.ndarray) -> Store:
        """All of the stream in memory.

        Args:
            lengths: bytes of text each id stands for.
        """
        words = self.cut(np.zeros(1, np.int64), self.size)[0]
        ids, unscored = (words & ID).astype(np.int32), (words & UNSCORED) > 0
        size = int(lengths[ids[~unscored]].sum())
        return Store(ids, self.offsets, size, unscored, self.whole)

    def _pieces(self, first: int, length: int) -> list[tuple[int, int, int, int, int]]:
        """Where words first..first + length are: place in the row, file, record, from, to."""
        place, stop = max(first, 0), min(first + length, self.size)
        shard = int(np.searchsorted(self.starts, place, side="right")) - 1
        pieces = []
        while place < stop:
            if place >= self.starts[shard + 1]:
                shard += 1
                continue
            record, low = divmod(place - int(self.starts[shard]), RECORD)
            end = min(stop, int(self.starts[shard + 1]), place - low + RECORD)
            pieces.append((place - first, shard, record, low, low + end - place))
            place = end
        return pieces

    def _read(self, shard: int, records: list[int]) -> list[bytes]:
        try:
            if shard not in self._readers:
                reader = array_record().ArrayRecordReader(os.fsencode(self.paths[shard]), _READ)
                self._readers[shard] = reader
                if len(self._readers) > OPEN:
                    self._readers.popitem(last=False)[1].close()
            self._readers.move_to_end(shard)
            return self._readers[shard].read(records)
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(f"{self.paths[shard]} is damaged: {one_line(error)}") from None


def lengths_of(path: Path) -> Path:
    """The file of the lengths of a file's documents."""
    return path.with_name(path.name.removesuffix(SUFFIX) + ".lengths.npy")


def array_record() -> Any:
    """The package's module.

    Raises:
        ConfigError: it is not installed.
    """
    return import_optional(
        "array_record.python.array_record_module", "pip install 'k2jax[arrayrecord]'"
    )
