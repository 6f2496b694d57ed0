"""One choice of an answer: what the engine says of a sequence becomes pieces of JSON."""

import abc
from typing import Any

from k2jax.inference.request import Output

Piece = dict[str, Any]  # what an event adds to a choice; the last has a "finish_reason"


class Choice(abc.ABC):
    """Reads one choice, event by event.

    Attributes:
        tokens: that the choice has, the one that ended it too.
        finish_reason: None until it has ended.
        error: one line, where the engine failed.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.finish_reason: str | None = None
        self.error = ""

    @property
    def complete(self) -> bool:
        """Whether no more tokens are needed."""
        return self.finish_reason is not None

    @abc.abstractmethod
    def feed(self, output: Output) -> list[Piece]:
        """The pieces that an event adds; the last has a `finish_reason`."""
