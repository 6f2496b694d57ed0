"""Which rows a step sees: a pure function of (seed, step), whatever the number of hosts."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from k2jax.data.mixture import PERIOD, Mixture, quotas
from k2jax.data.rows import Batch, Rows, empty_batch, make_windows, plan_windows
from k2jax.data.store import Store
from k2jax.data.stream import Stream

AHEAD = 2  # batches made before they are asked for
ROUNDS = 6  # of the Feistel network; four already pass for random, two more cost nothing


class Batches:
    """Rows in an order shuffled anew in every epoch; epochs of each stream follow without a gap."""

    def __init__(self, data: Stream | Mixture, rows: int, context: int, seed: int):
        """Plan batches of `rows` rows of `context` tokens, over all hosts together."""
        self.rows, self.context, self.seed = rows, context, seed
        streams = data.streams if isinstance(data, Mixture) else (data,)
        self._sources = [Rows(stream, context) for stream in streams]
        self.epoch_rows = [source.count for source in self._sources]
        if not all(self.epoch_rows):
            raise ValueError("there are no tokens to learn from")
        self._quotas = quotas(data.weights) if isinstance(data, Mixture) else None
        self._period = functools.lru_cache(4)(self._make_period)

    def row_numbers(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What `step` (0, 1, ...) sees: of which stream, which rows; two int64 [rows]."""
        return self._numbers(step * self.rows + np.arange(self.rows, dtype=np.int64))

    def batch(self, step: int, parts: Sequence[int] = (0,), of: int = 1) -> Batch:
        """Rows of a step: the arrays of `k2jax.data.rows`, [rows x len(parts) / of, context].

        All parts, one after the other, are the same global batch for any `of`.

        Args:
            step: 0, 1, ...
            parts: which ones, of a batch cut into `of` equal ones: a host takes its devices' own.
            of: how many there are.
        """
        chosen = rows_of(self.rows, parts, of)
        source, numbers = self._numbers(step * self.rows + chosen)
        if len(self._sources) == 1:
            return self._sources[0].make(numbers)
        mixed = empty_batch(len(numbers), self.context)
        for s, rows in enumerate(self._sources):
            here = source == s
            for name, array in rows.make(numbers[here]).items() if here.any() else ():
                mixed[name][here] = array
        return mixed

    def epochs(self, step: int) -> list[float]:
        """How often each stream has been read when `step` begins."""
        end = step * self.rows
        source, rank = self._ranks(np.arange(max(end - 2 * PERIOD, 0), end))
        last = [int(rank[source == s].max(initial=-1)) + 1 for s in range(len(self._sources))]
        return [rows / size for rows, size in zip(last, self.epoch_rows, strict=True)]

    def _numbers(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, rank = self._ranks(index)
        numbers = np.empty_like(rank)
        for s, size in enumerate(self.epoch_rows):
            epoch, place = np.divmod(rank, size)
            for e in np.unique(epoch[source == s]):
                here = (source == s) & (epoch == e)
                numbers[here] = shuffle(place[here], size, self.seed + (s << 32), int(e))
        return source, numbers

    def _ranks(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row's stream, and how many rows of that stream came before it in the run."""
        if self._quotas is None:
            return np.zeros_like(index), index
        period, place = np.divmod(index, PERIOD)
        source, rank = np.empty_like(index), np.empty_like(index)
        for p in np.unique(period):
            here = period == p
            sources, before = self._period(int(p))
            source[here] = sources[place[here]]
            rank[here] = before[place[here]] + self._quotas[source[here]] * p
        return source, rank

    def _make_period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams of a period's rows, and the rows of the same stream before each in it."""
        assert self._quotas is not None
        places = shuffle(np.arange(PERIOD), PERIOD, self.seed + (1 << 62), period)
        sources = np.searchsorted(np.cumsum(self._quotas), places, side="right")
        before = np.empty_like(sources)
        for s in range(len(self._sources)):
            before[sources == s] = np.arange(self._quotas[s])
        return sources, before


def rows_of(rows: int, parts: Sequence[int], of: int) -> np.ndarray:
    """Numbers of the rows in some parts of a batch of `rows` rows, int64."""
    if rows % of or not all(0 <= part < of for part in parts):
        raise ValueError(f"{rows} rows have no {of} equal parts with the numbers {list(parts)}")
    share = rows // of
    return (np.array(parts, np.int64)[:, None] * share + np.arange(share)).reshape(-1)


def shuffle(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a seeded permutation of 0..size-1 sends each index.

    A Feistel network over the next even number of bits, walked until it lands inside: no table,
    so trillions of rows cost no more than a few, and no library's generator can change it.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    keys = _round_keys(seed, epoch)
    mask = np.uint64((1 << half) - 1)
    value = _feistel(index.astype(np.uint64), keys, half, mask)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], keys, half, mask)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, keys: np.ndarray, half: int, mask: np.uint64) -> np.ndarray:
    left, right = value >> np.uint64(half), value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << np.uint64(half)) | right


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    start = _mix(np.array([seed % (1 << 64)], np.uint64)) + np.uint64(epoch)
    return _mix(_mix(start) + np.arange(1, ROUNDS + 1, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that looks random (the finaliser of splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def prefetch(
    fetch: Callable[[int], Any], start: int, count: int | None = None, ahead: int = AHEAD
) -> Iterator[Any]:
    """`fetch(step)` for step = start, start + 1, ..., made in a thread a little ahead.

    An exception in `fetch` is raised here in its turn. Closing or dropping the iterator ends the
    thread after the step it is at.

    Args:
        fetch: for example `batches.batch`, or that and the move to the devices.
        start: first step.
        count: steps; without it, no end.
        ahead: steps that may be ready and waiting.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="k2jax-data")
    waiting: deque[Future[Any]] = deque()
    step = start
    try:
        while waiting or count is None or step < start + count:
            while len(waiting) <= ahead and (count is None or step < start + count):
                waiting.append(pool.submit(fetch, step))
                step += 1
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def eval_batches(
    store: Store,
    rows: int,
    context: int,
    *,
    stride: int = 0,
    limit: int = 0,
    parts: Sequence[int] = (0,),
    of: int = 1,
) -> Iterator[Batch]:
    """Every document once, in order; the last batch is filled up with rows of padding.

    Scored (weight 1) is each token of each document and its [EOS], once; the first token is
    predicted from [BOS] alone. So the bytes of the targets with weight 1 are `store.bytes`.

    Args:
        store: documents, usually the held-out ones.
        rows: rows in a batch, all parts together.
        context: tokens in a row.
        stride: distance of a document's windows, 1..context; a scored token then sees at least
            `context - stride` tokens of its document. 0 means `context`: no overlap, least work.
        limit: at most that many rows, evenly spread over all of them; 0 means all.
        parts: which parts of each batch to make, as of `Batches.batch`.
        of: how many there are.
    """
    if not 0 <= stride <= context:
        raise ValueError(f"stride is {stride}; it must be in 1..{context}, or 0 for no overlap")
    windows = plan_windows(store, context, stride or context)
    numbers = np.arange(windows.rows)
    if 0 < limit < windows.rows:
        numbers = np.arange(limit) * windows.rows // limit
    numbers = np.pad(numbers, (0, -len(numbers) % rows), constant_values=-1)
    chosen = rows_of(rows, parts, of)
    for start in range(0, len(numbers), rows):
        yield make_windows(store, windows, numbers[start : start + rows][chosen], context)
