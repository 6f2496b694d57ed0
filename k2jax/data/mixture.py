"""Several streams in given shares: which one a row of a run comes from, by arithmetic."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from k2jax.config import ConfigError
from k2jax.data.stream import Stream

PERIOD = 16_384  # rows over which the shares hold exactly; a batch of K2
_WEIGHTED = re.compile(r"(.+):([0-9.eE+-]+)")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Streams and the share of the rows that comes from each.

    Attributes:
        streams: each with an order and epochs of its own.
        weights: in any unit.
        names: for people.
    """

    streams: tuple[Stream, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many tokens all streams have."""
        return sum(stream.size for stream in self.streams)


def parse(path: str) -> list[tuple[str, float]]:
    """Folders and weights of `a:0.7,b:0.3`; none where `path` is one path.

    Raises:
        ConfigError: a weight is missing, or not positive.
    """
    parts = path.split(",")
    matches = [_WEIGHTED.fullmatch(part.strip()) for part in parts]
    if not any(matches) or Path(path).exists():
        return []
    weighted = []
    for part, match in zip(parts, matches, strict=True):
        if match is None:
            raise ConfigError(f"data.path: {part.strip()!r} needs a weight, as in a:0.7,b:0.3")
        try:
            weight = float(match[2])
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.path: the weight of {match[1]} is {match[2]}; it must be > 0")
        weighted.append((match[1], weight))
    return weighted


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of each stream in a period, at least one: largest remainders."""
    exact = np.array(weights) / sum(weights) * PERIOD
    rows = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(np.floor(exact) - exact, kind="stable")
    missing = PERIOD - int(rows.sum())
    rows[by_remainder[: max(missing, 0)]] += 1
    rows[np.argmax(rows)] += min(missing, 0)  # where streams of less than a row got one
    return rows
