"""One JSON value, token by token, that ends before its tokens do.

Three ways to choose a mask, by how many tokens are left:

* Far from the end, what the grammar allows. A bound from the schema alone says that whatever comes,
  the value can still be closed.
* Nearer, the same without tokens that open many brackets.
* Near the end, tokens after which a closing text that fits is known. The first token of the closing
  text that is known before is always among them, so the value ends in time.
"""

import numpy as np

from k2jax.constrain.json_schema import Schema
from k2jax.constrain.shortest import Position
from k2jax.constrain.vocabulary import allow, forbid, list_ids

TRIED = 128  # tokens that are tried near the end, of each kind
POOL = 6  # closing texts that are tried for each
SEARCHES = 16  # of them, how many by a search


class JsonValue:
    """A value that is being written."""

    def __init__(self, schema: Schema):
        """Start before the value."""
        self._schema = schema
        self._words = schema.vocabulary
        self._matcher = schema.matcher.deep_copy()
        self._bytes = schema.byte_matcher.deep_copy()  # lags behind by `_pending`
        self._position = Position()
        self._pending: list[int] = []
        self._opened = 0  # most brackets that the pending tokens may have opened
        self._closing: list[int] | None = list(schema.first)  # tokens that end the value
        self._plans: dict[int, list[int]] = {}  # the same after each token that was tried
        self._searches = 0

    @property
    def is_complete(self) -> bool:
        """Whether the value may end here."""
        return bool(self._matcher.is_accepting())

    def mask(self, room: int) -> np.ndarray:
        """Tokens that may come next, uint32 [words], in a new array.

        Args:
            room: tokens that the value may still have.
        """
        words, bounds = self._words, self._schema.bounds
        mask = np.zeros(words.words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        for stop in words.stops:
            forbid(mask, stop)
        self._plans = {}
        level = bounds.level
        few = (room - 1) // level - self._position.depth - self._opened - 2
        if few >= words.most_opened:
            return mask
        if self._pending:
            self._catch_up()
            few = (room - 1) // level - self._position.depth - 2
        if few < words.most_opened and bounds.determined:
            closing = self._find_closing()
            if closing is not None:
                few = max(few, (room - 1 - len(closing)) // level - 2)
        if few >= words.most_opened:
            return mask
        if few >= 1:
            return mask & words.few_opened[few]
        return self._mask_near_end(mask, room)

    def accept(self, token: int) -> None:
        """Take a token.

        Raises:
            ValueError: the schema does not allow it here.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here")
        self._pending.append(token)
        self._opened += int(self._words.opened[token])
        if token in self._plans:
            self._closing = self._plans[token]
        elif self._closing and self._closing[0] == token:
            self._closing = self._closing[1:]
        elif self._closing is not None and not self._ends_by(self._closing):
            self._closing = None
        self._plans = {}

    def _catch_up(self) -> None:
        """Bring the bytes and the position to where the tokens are."""
        text = b"".join(self._words.tokens[token] for token in self._pending)
        self._bytes.consume_tokens(list(text))
        self._position.feed(text)
        self._pending, self._opened = [], 0

    def _find_closing(self) -> list[int] | None:
        """Tokens that end the value from here."""
        if self._closing is None:
            if self._pending:
                self._catch_up()
            text = self._schema.shortest.complete(self._bytes, self._position)
            self._closing = None if text is None else self._words.split(text)
        return self._closing

    def _mask_near_end(self, mask: np.ndarray, room: int) -> np.ndarray:
        """Only tokens after which a closing text of the rest of `room` is known."""
        closing = self._find_closing()
        if closing is None:
            return mask
        near = np.zeros_like(mask)
        self._searches, closings = SEARCHES, [closing]
        for token in self._list_candidates(mask):
            plan = self._plan(int(token), closings, room - 1)
            if plan is not None:
                self._plans[int(token)] = plan
                allow(near, int(token))
        if closing and len(closing) <= room:
            self._plans[closing[0]] = closing[1:]
            allow(near, closing[0])
        if self._can_go_on_in_string(closing, room):
            near |= mask & self._words.content
        return near

    def _can_go_on_in_string(self, closing: list[int], room: int) -> bool:
        """Whether any content of the string that is open leaves it as soon closed as before."""
        in_string = self._position.inside == "string" and not self._position.escaped
        whole = in_string and _is_whole(bytes(self._position.written))
        closes = bool(closing) and self._words.tokens[closing[0]].startswith(b'"')
        return whole and closes and self._schema.bounds.plain and len(closing) <= room - 1

    def _list_candidates(self, mask: np.ndarray) -> np.ndarray:
        """The tokens to try: all, or the commonest where there are many, and those with quotes."""
        ids = list_ids(mask)
        if len(ids) <= TRIED:
            return ids
        closers = list_ids(mask & self._words.closers)[:TRIED]
        return np.unique(np.concatenate([ids[:TRIED], closers]))

    def _plan(self, token: int, closings: list[list[int]], room: int) -> list[int] | None:
        """Tokens that end the value after `token`, at most `room`; None where none are known.

        Args:
            token: that may come next.
            closings: that were right without it or after others; what is new is added.
            room: tokens that there may be after it.
        """
        for closing in closings[-POOL:]:
            if len(closing) <= room and self._ends_by([token, *closing]):
                return closing
        text = self._words.tokens[token]
        rest = b"".join(self._words.tokens[i] for i in closings[0])
        if rest.startswith(text):
            shorter = self._words.split(rest[len(text) :])
            return shorter if len(shorter) <= room else None
        plan = self._search_plan(text, room)
        if plan is not None:
            closings.append(plan)
        return plan

    def _ends_by(self, tokens: list[int]) -> bool:
        """Whether `tokens` end the value."""
        path = [*tokens, self._words.stops[0]]
        return bool(self._matcher.validate_tokens(path) == len(path))

    def _search_plan(self, text: bytes, room: int) -> list[int] | None:
        if self._searches <= 0:
            return None
        self._searches -= 1
        matcher, position = self._bytes.deep_copy(), self._position.copy()
        matcher.consume_tokens(list(text))
        position.feed(text)
        end = self._schema.shortest.complete(matcher, position)
        if end is None:
            return None
        tokens = self._words.split(end)
        return tokens if len(tokens) <= room else None


def _is_whole(text: bytes) -> bool:
    """Whether `text` ends where a character does."""
    try:
        text[-4:].decode() if len(text) < 4 else text[-8:].decode(errors="ignore")
    except UnicodeDecodeError:
        return False
    last = next((byte for byte in reversed(text[-4:]) if byte & 0xC0 != 0x80), 0)
    return last < 0x80
