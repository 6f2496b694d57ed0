"""A source cut into parts of about equal size, for processes to work on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from k2jax.data import readers
from k2jax.data.readers import Share
from k2jax.data.sources import Source
from k2jax.data.tally import Tally
from k2jax.data.values import Value

PART_BYTES = (4 << 20, 512 << 20)  # of text: the least and the most that one part takes
PARTS = 256  # and how many there are in between
SHARES = 8  # of a file that every process must read from its beginning
# Text in a file over the file's own size, where it is compressed; for sizes and time left only.
UNPACKED = {".gz": 4, ".zst": 4, ".xz": 5, ".bz2": 5, ".parquet": 3}


class Piece(NamedTuple):
    """A file, or a share of it, and about how many bytes of text it has."""

    file: Path
    share: Share
    size: int


class Part(NamedTuple):
    """What one process does at a time."""

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """About how many bytes of text."""
        return sum(piece.size for piece in self.pieces)

    def values(
        self, source: Source, tally: Tally | None = None
    ) -> Iterator[tuple[Path, str, Value]]:
        """File, name and value of each document; `tally` counts what is empty or replaced."""
        for file, share, _ in self.pieces:
            records = source.records(file, share, tally)
            yield from ((file, name, value) for name, value in records)


def text_bytes(file: Path) -> int:
    """About how many bytes of text a file has."""
    return os.stat(file).st_size * UNPACKED.get(file.suffix.lower(), 1)


def cut(source: Source) -> list[Part]:
    """The parts of a source, in its order; they depend on nothing but its files."""
    sizes = [text_bytes(file) for file in source.files]
    least, most = PART_BYTES
    target = min(max(sum(sizes) // PARTS, least), most)
    parts: list[Part] = []
    waiting: list[Piece] = []  # small files, for one part together
    held = 0  # bytes of them
    for file, size in zip(source.files, sizes, strict=True):
        of = _shares(source, file, -(-size // target))
        pieces = [Piece(file, Share(i, of), size // of) for i in range(of)]
        if of == 1:
            waiting += pieces
            held += size
        if waiting and (of > 1 or held >= target):
            parts.append(Part(tuple(waiting)))
            waiting, held = [], 0
        if of > 1:
            parts += [Part((piece,)) for piece in pieces]
    return [*parts, Part(tuple(waiting))] if waiting else parts


def _shares(source: Source, file: Path, wanted: int) -> int:
    if file != source.root and not readers.has_records(file):
        return 1  # a file of a folder is one document
    if readers.is_whole(file):
        return 1
    return max(wanted if readers.is_sought(file) else min(wanted, SHARES), 1)
