"""Fixed rows of tokens, cut from a store by arithmetic: no state, so no host count matters.

A row's arrays, all [rows, context]:
    tokens    int32    inputs
    targets   int32    the next token of the same document; 0 where there is none
    segments  int32    1, 2, ... by document within the row; 0 is padding. Attention stays inside.
    positions int32    0, 1, ... within each segment
    weights   float32  1 where there is a target to learn or score, else 0
"""

from typing import NamedTuple

import numpy as np

from k2jax.data.store import Store

Batch = dict[str, np.ndarray]
NAMES = ("tokens", "targets", "segments", "positions", "weights")


def row_count(store: Store, context: int) -> int:
    """Rows that cover the store; the last one may be padded."""
    return -(-max(len(store.tokens) - 1, 0) // context)


def make_rows(store: Store, rows: np.ndarray, context: int) -> Batch:
    """The given rows of the stream of documents.

    Row r has inputs stream[r * context : (r + 1) * context] and targets one further on. Every
    token but a [BOS] is a target exactly once over all rows.

    Args:
        store: documents.
        rows: row numbers, [rows]; a number outside 0..row_count - 1 gives a row of padding.
        context: tokens in a row.
    """
    spot = rows.astype(np.int64)[:, None] * context + np.arange(context + 1)
    inside = (spot >= 0) & (spot < len(store.tokens))
    spot = np.where(inside, spot, 0)
    stream = store.tokens[spot].astype(np.int32)
    document = np.searchsorted(store.offsets, spot, side="right") - 1
    begin = np.maximum(store.offsets[document], spot[:, :1])
    used = inside[:, :-1]
    scored = used & inside[:, 1:] & (document[:, 1:] == document[:, :-1])
    return _batch(
        tokens=np.where(used, stream[:, :-1], 0),
        targets=np.where(scored, stream[:, 1:], 0),
        segments=np.where(used, (document - document[:, :1] + 1)[:, :-1], 0),
        positions=np.where(used, (spot - begin)[:, :-1], 0),
        weights=scored,
    )


class Windows(NamedTuple):
    """Pieces of documents to score, in order; every array is [windows]."""

    begin: np.ndarray  # first input, as an index into the store's tokens
    length: np.ndarray  # inputs
    fresh: np.ndarray  # how many of the last targets no earlier window has scored
    row: np.ndarray  # which row it is laid into
    place: np.ndarray  # its first place in that row
    segment: np.ndarray  # 1, 2, ... within the row


def plan_windows(store: Store, context: int, stride: int) -> Windows:
    """Cut every document into windows of at most `context` inputs and lay them into rows.

    A document's windows begin `stride` apart, so a scored token sees at least
    `context - stride` tokens of its own document, or all there are. Windows fill a row in order;
    one that does not fit begins the next row.
    """
    begin, length, fresh = [], [], []
    for first, end in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True):
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


def make_windows(store: Store, windows: Windows, rows: np.ndarray, context: int) -> Batch:
    """The given rows of a plan; a row number of -1 gives a row of padding."""
    shape = (len(rows), context)
    batch = _batch(**{name: np.zeros(shape) for name in NAMES})
    for index, row in enumerate(rows):
        first, last = np.searchsorted(windows.row, [row, row + 1])
        for w in range(first, last) if row >= 0 else ():
            begin, length = int(windows.begin[w]), int(windows.length[w])
            span = slice(int(windows.place[w]), int(windows.place[w]) + length)
            batch["tokens"][index, span] = store.tokens[begin : begin + length]
            batch["targets"][index, span] = store.tokens[begin + 1 : begin + length + 1]
            batch["segments"][index, span] = windows.segment[w]
            batch["positions"][index, span] = np.arange(length)
            batch["weights"][index, span.stop - int(windows.fresh[w]) : span.stop] = 1
    return batch


def _batch(**arrays: np.ndarray) -> Batch:
    batch = {name: array.astype(np.int32) for name, array in arrays.items()}
    return batch | {"weights": arrays["weights"].astype(np.float32)}
