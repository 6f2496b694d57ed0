"""One of a few texts, token by token."""

from collections.abc import Mapping

import numpy as np

from k2jax.constrain.vocabulary import Vocabulary, allow


class Literal:
    """A text that is being written, one of several.

    Attributes:
        rests: what is left of the texts that begin as what was written, by their keys.
    """

    def __init__(self, words: Vocabulary, texts: Mapping[int, bytes]):
        """Start before any of `texts`."""
        self._words = words
        self.rests = dict(texts)

    def mask(self, room: int, after: Mapping[int, int]) -> np.ndarray:
        """Tokens that may come next, uint32 [words], in a new array.

        Args:
            room: tokens that are left for the text and what must follow.
            after: of them, how many must follow each text.
        """
        mask = np.zeros(self._words.words, np.uint32)
        for key, rest in self.rests.items():
            for length in range(1, len(rest) + 1):
                id_ = self._words.id_of.get(rest[:length])
                if id_ is not None and self._fits(rest[length:], room - 1 - after[key]):
                    allow(mask, id_)
        return mask

    def _fits(self, rest: bytes, room: int) -> bool:
        return len(rest) <= room or self._words.count(rest) <= room

    def accept(self, token: int) -> None:
        """Take a token.

        Raises:
            ValueError: no text goes on so.
        """
        text = self._words.tokens[token]
        rests = {key: r[len(text) :] for key, r in self.rests.items() if r.startswith(text)}
        if not text or not rests:
            raise ValueError(f"token {token} is not allowed here")
        self.rests = rests

    @property
    def completed(self) -> list[int]:
        """Keys of the texts that are complete."""
        return [key for key, rest in self.rests.items() if not rest]
