"""A stream of documents as 32-bit words: a token with what a row must know of it."""

from typing import Protocol

import numpy as np

BEGIN = np.uint32(1 << 31)  # a document begins with this token
UNSCORED = np.uint32(1 << 30)  # nothing is learned from predicting this token
ID = np.uint32((1 << 30) - 1)  # where the token's id is
PADDING = np.uint32((1 << 32) - 1)  # what is outside of a stream


class Stream(Protocol):
    """Documents end to end: `Store` (a flat file in the cache) or `Shards` (ArrayRecord)."""

    @property
    def whole(self) -> bool:
        """Whether documents are laid into rows whole; else rows are cut from the stream."""

    @property
    def offsets(self) -> np.ndarray:
        """Where each document begins, and the end, int64 [documents + 1]."""

    @property
    def size(self) -> int:
        """How many tokens."""

    def cut(self, begin: np.ndarray, length: int) -> np.ndarray:
        """Stretches of the stream, PADDING outside of it.

        Args:
            begin: where each begins, int64 [stretches]; any integer.
            length: words of each.

        Returns:
            uint32 [stretches, length].
        """


def document(ids: list[int] | np.ndarray, unscored: np.ndarray | None = None) -> np.ndarray:
    """The words of one document, uint32 [tokens].

    Args:
        ids: its tokens, at least one.
        unscored: bool [tokens]; without it, all tokens but the first are learned.
    """
    words = np.array(ids, np.uint32)
    if unscored is not None:
        words[unscored] |= UNSCORED
    words[0] |= BEGIN
    return words
