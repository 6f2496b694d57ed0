"""Which experts each token in the pool chose, in the host's memory.

It goes by pages as the latents do: what several sequences share has the experts of the one that
computed it, and what is computed again has the later ones.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

# First token, number of tokens, pages of the sequence.
Place = tuple[int, int, Sequence[int] | np.ndarray]


class ExpertLog:
    """Experts by page and place in it."""

    def __init__(self, pages: int, page: int):
        """Take no memory before anything is read.

        Args:
            pages: of the pool.
            page: tokens of one.
        """
        self._pages, self._page = pages, page
        self._kept = np.zeros(0, np.int16)
        self._new: list[tuple[Mapping[int, Place], jax.Array]] = []

    def add(self, places: Mapping[int, Place], expert_BTLK: jax.Array) -> None:
        """Take the experts that a call gave, without waiting for it.

        Args:
            places: by row of the call.
            expert_BTLK: of the tokens of each row.
        """
        copied = {row: (start, n, np.array(pages)) for row, (start, n, pages) in places.items()}
        self._new.append((copied, expert_BTLK))

    def read(self, pages: Sequence[int], count: int) -> np.ndarray:
        """Return the experts of a sequence's first tokens, int16 [count, layers, a token]."""
        for places, expert_BTLK in self._new:
            self._note(places, np.asarray(expert_BTLK))
        self._new.clear()
        at = np.arange(count)
        return self._kept[np.asarray(pages)[at // self._page], at % self._page]

    def _note(self, places: Mapping[int, Place], expert_BTLK: np.ndarray) -> None:
        if not self._kept.size:
            self._kept = np.zeros((self._pages, self._page, *expert_BTLK.shape[2:]), np.int16)
        for row, (start, count, pages) in places.items():
            at = start + np.arange(count)
            page = np.asarray(pages)[at // self._page]
            self._kept[page, at % self._page] = expert_BTLK[row, :count]
