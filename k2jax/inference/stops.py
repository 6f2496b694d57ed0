"""Text of new tokens as they come, up to the first stop text."""

from collections.abc import Iterable, Sequence

from k2jax.text.incremental_decode import TextStream
from k2jax.text.interface import TokenizerLike
from k2jax.text.stop_text import StopText


class TextCutter:
    """Makes text of ids, and ends it before the stop text that is complete first.

    Incomplete characters are held back, and so is the end of the text while it may be the
    beginning of a stop text. What comes out does not depend on where tokens end.
    """

    def __init__(self, tokenizer: TokenizerLike, stops: Sequence[str] = ()):
        """`stops` are not empty."""
        self._stream = TextStream(tokenizer)
        self._stop = StopText(stops)

    def feed(self, ids: Iterable[int]) -> tuple[str, str | None]:
        """Return the text that is certain now, and the stop text that ended it, if one did."""
        return self._stop.feed(self._stream.feed(ids)), self._stop.matched or None

    def close(self) -> str:
        """Return what was held back."""
        return self._stop.feed(self._stream.close()) + self._stop.close()
