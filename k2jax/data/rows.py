"""Fixed rows of tokens, cut from a store by arithmetic: no state, so no host count matters.

A row's arrays, all [rows, context]:
    tokens    int32    inputs
    targets   int32    the next token of the same document; 0 where there is none
    segments  int32    1, 2, ... by document within the row; 0 is padding. Attention stays inside.
    positions int32    0, 1, ... within each segment
    weights   float32  1 where there is a target to learn or score, else 0

Text is a stream that is cut every `context` tokens; conversations, and what is scored, are laid
into rows whole, as long as they fit.
"""

import itertools
from typing import NamedTuple

import numpy as np

from k2jax.data.stream import BEGIN, ID, PADDING, UNSCORED, Stream

Batch = dict[str, np.ndarray]
NAMES = ("tokens", "targets", "segments", "positions", "weights")


def empty_batch(rows: int, context: int) -> Batch:
    """Rows of padding."""
    kinds = {"weights": np.float32}
    return {name: np.zeros((rows, context), kinds.get(name, np.int32)) for name in NAMES}


class Rows:
    """All rows of a stream, by number."""

    def __init__(self, stream: Stream, context: int):
        """Where documents stay whole, lay them out; else there is nothing to prepare."""
        self.stream, self.context = stream, context
        self.windows = plan_windows(stream, context, context) if stream.whole else None
        self.count = self.windows.rows if self.windows else row_count(stream, context)

    def make(self, rows: np.ndarray) -> Batch:
        """The arrays of the given rows."""
        if self.windows:
            return make_windows(self.stream, self.windows, rows, self.context)
        return make_rows(self.stream, rows, self.context)


def row_count(stream: Stream, context: int) -> int:
    """Rows that cover the stream; the last one may be padded."""
    return -(-max(stream.size - 1, 0) // context)


def make_rows(stream: Stream, rows: np.ndarray, context: int) -> Batch:
    """The given rows of a stream of documents.

    Row r has inputs stream[r * context : (r + 1) * context] and targets one further on. Every
    token that does not begin a document is a target exactly once over all rows.

    Args:
        stream: documents.
        rows: row numbers, [rows]; a number outside 0..row_count - 1 gives a row of padding.
        context: tokens in a row.
    """
    return from_words(stream.cut(rows.astype(np.int64) * context, context + 1))


def from_words(words: np.ndarray) -> Batch:
    """Rows from their words, uint32 [rows, context + 1]."""
    inputs, targets = words[:, :-1], words[:, 1:]
    used = inputs != PADDING
    scored = targets < UNSCORED  # nor does a document begin there
    begins = inputs >= BEGIN
    begins[:, :1] = True
    place = np.arange(inputs.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(begins, place, np.int32(0)), axis=1)
    return {
        "tokens": np.where(used, inputs & ID, 0).astype(np.int32),
        "targets": np.where(scored, targets, 0).astype(np.int32),
        "segments": np.cumsum(begins, axis=1, dtype=np.int32) * used,
        "positions": (place - first) * used,
        "weights": scored.astype(np.float32),
    }


class Windows(NamedTuple):
    """Pieces of documents, in order; every array is [windows]."""

    begin: np.ndarray  # first input, as an index into the stream
    length: np.ndarray  # inputs
    fresh: np.ndarray  # how many of the last targets no earlier window has scored
    row: np.ndarray  # which row it is laid into
    place: np.ndarray  # its first place in that row
    segment: np.ndarray  # 1, 2, ... within the row

    @property
    def rows(self) -> int:
        """How many rows they fill."""
        return int(self.row[-1]) + 1 if len(self.row) else 0


def plan_windows(stream: Stream, context: int, stride: int) -> Windows:
    """Cut every document into windows of at most `context` inputs and lay them into rows.

    A document's windows begin `stride` apart, so a scored token sees at least
    `context - stride` tokens of its own document, or all there are. Windows fill a row in order;
    one that does not fit begins the next row.
    """
    begin, length, fresh = [], [], []
    offsets = stream.offsets.tolist()
    for first, end in itertools.pairwise(offsets):
        scored = first  # targets up to and including this index are done
        while scored < end - 1:
            start = first if scored == first else max(first, scored + stride - context)
            stop = min(start + context, end - 1)
            begin.append(start)
            length.append(stop - start)
            fresh.append(stop - scored)
            scored = stop
    row, place, segment = _lay_out(length, context)
    return Windows(*(np.array(x, np.int64) for x in (begin, length, fresh, row, place, segment)))


def _lay_out(lengths: list[int], context: int) -> tuple[list[int], list[int], list[int]]:
    rows, places, segments = [], [], []
    row, used, segment = 0, 0, 0
    for length in lengths:
        if used + length > context:
            row, used, segment = row + 1, 0, 0
        segment += 1
        rows.append(row)
        places.append(used)
        segments.append(segment)
        used += length
    return rows, places, segments


def make_windows(stream: Stream, windows: Windows, rows: np.ndarray, context: int) -> Batch:
    """The given rows of a plan; a row number of -1 gives a row of padding."""
    batch = empty_batch(len(rows), context)
    for index, row in enumerate(rows):
        first, last = np.searchsorted(windows.row, [row, row + 1])
        if row < 0 or first == last:
            continue
        base, end = windows.begin[first], windows.begin[last - 1] + windows.length[last - 1] + 1
        stretch = stream.cut(windows.begin[first : first + 1], int(end - base))[0]
        for w in range(first, last):
            begin, length = int(windows.begin[w] - base), int(windows.length[w])
            fresh, place = length - int(windows.fresh[w]), int(windows.place[w])
            words, span = stretch[begin : begin + length + 1], slice(place, place + length)
            batch["tokens"][index, span] = words[:-1] & ID
            batch["targets"][index, span] = words[1:] & ID
            batch["segments"][index, span] = windows.segment[w]
            batch["positions"][index, span] = np.arange(length)
            batch["weights"][index, place + fresh : span.stop] = words[1 + fresh :] < UNSCORED
    return batch
