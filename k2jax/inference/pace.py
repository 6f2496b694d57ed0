"""How many chunks of prompts a step may read, so that those who get new tokens do not wait long."""

from collections.abc import Sequence

LEARNS = 0.2  # of the difference between a step's time and what was expected of it
SURPRISE = 2.0  # times the expected: a step that took longer counts as this long


class Pace:
    """Shares the device's time between prompts and new tokens, by what calls have taken.

    Times only decide when something is computed, never what.
    """

    def __init__(self, sizes: Sequence[int], share: float):
        """Know nothing yet.

        Args:
            sizes: chunks of calls that read prompts, ascending; calls are padded to the next.
            share: of the time, for prompts while others get new tokens; 1: prompts first.
        """
        self._sizes, self._share = tuple(sizes), share
        self._chunks: dict[int, float] = {}  # seconds of a call, by its size
        self._decode = 0.0  # seconds
        self._credit = 0.0

    @property
    def most(self) -> int:
        """Chunks of a call that nobody waits for."""
        return self._sizes[-1]

    def allow(self) -> int:
        """Return how many chunks the next step may read beside new tokens."""
        if self._share >= 1:
            return self.most
        if not self._chunks or not self._decode:
            return self._sizes[0]
        gain = self._decode * self._share / (1 - self._share)
        # No saving up: an idle minute must not become a long step.
        self._credit = min(self._credit + gain, max(gain, self._cost(self._sizes[0])))
        affordable = [size for size in self._sizes if self._cost(size) <= self._credit]
        return affordable[-1] if affordable else 0

    def note(self, chunks: int, decodes: bool, seconds: float) -> None:
        """Learn from a step: how many chunks it read, whether others got tokens, what it took."""
        size = next((n for n in self._sizes if n >= chunks), self.most) if chunks else 0
        if not decodes:
            self._learn(size, seconds)
        elif not chunks:
            self._decode += _step(self._decode, seconds)
        elif self._chunks and self._decode:
            # What it took, not what was expected: chunks far into a prompt take longer.
            took = max(seconds - self._decode, 0.0)
            self._credit -= min(took, SURPRISE * self._cost(size))
            expected = self._decode + self._cost(size)
            late = min(seconds, SURPRISE * expected) / expected
            self._decode += _step(self._decode, self._decode * late)
            self._learn(size, self._cost(size) * late)
        else:  # the first: half of it is a guess that later steps repair
            self._decode = self._decode or seconds / 2
            self._learn(size, seconds / 2)

    def _learn(self, size: int, seconds: float) -> None:
        old = self._chunks.get(size, 0.0)
        self._chunks[size] = old + _step(old, seconds)

    def _cost(self, size: int) -> float:
        """Seconds of a call; of a size that never was, from the nearest that was."""
        if size in self._chunks:
            return self._chunks[size]
        nearest = min(self._chunks, key=lambda other: abs(other - size))
        return self._chunks[nearest] * size / nearest


def _step(old: float, new: float) -> float:
    return LEARNS * (min(new, SURPRISE * old) - old) if old else new
