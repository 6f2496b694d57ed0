"""Text of new tokens as they come, up to the first stop text."""

from collections.abc import Iterable, Sequence

from k2jax.text.incremental_decode import TextStream
from k2jax.text.interface import TokenizerLike


class TextCutter:
    """Makes text of ids, and ends it before the stop text that is complete first.

    Incomplete characters are held back, and so is the end of the text while it may be the
    beginning of a stop text. What comes out does not depend on where tokens end.
    """

    def __init__(self, tokenizer: TokenizerLike, stops: Sequence[str] = ()):
        """`stops` are not empty."""
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, ids: Iterable[int]) -> tuple[str, str | None]:
        """Return the text that is certain now, and the stop text that ended it, if one did."""
        return self._cut(self._stream.feed(ids))

    def close(self) -> str:
        """Return what was held back."""
        text, stopped_by = self._cut(self._stream.close())
        return text if stopped_by else text + self._held

    def _cut(self, new: str) -> tuple[str, str | None]:
        if not self._stops:
            return new, None
        text = self._held + new
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, start, stop = min(ends)
            self._held = ""
            return text[:start], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
