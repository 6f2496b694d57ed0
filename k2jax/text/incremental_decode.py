"""Text of token ids as they come, never a part of a character."""

import codecs
from collections.abc import Iterable

from k2jax.text.interface import TokenizerLike


class TextStream:
    """Decodes ids in any portions: what comes out, joined, is `tokenizer.decode` of all of them.

    A token may end within a character; the bytes of an incomplete one are held back.
    """

    def __init__(self, tokenizer: TokenizerLike):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete; maybe none."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def close(self) -> str:
        """What was held back, as U+FFFD where it never became a character."""
        return self._utf8.decode(b"", final=True)
