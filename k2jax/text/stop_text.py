"""Texts that end an answer, however the answer's text is cut up."""

from collections.abc import Sequence


class StopText:
    """Passes text on up to the first of some texts; nothing that it passes on is taken back.

    Of several texts the one that is complete first wins; of those that end together, the longest.

    Attributes:
        matched: the text that came; "" so far none did.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(texts)
        self._held = ""
        self.matched = ""

    def feed(self, text: str) -> str:
        """Take more text; what can be passed on of it and of what was held back."""
        if self.matched or not self._texts:
            return "" if self.matched else text
        text, self._held = self._held + text, ""
        places = [
            (at + len(stop), at, stop) for stop in self._texts if (at := text.find(stop)) >= 0
        ]
        if places:
            _, at, self.matched = min(places)
            return text[:at]
        keep = max(overlap(text, stop) for stop in self._texts)
        text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return text

    def close(self) -> str:
        """End the text; what was held back was no such text."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
