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
from k2jax.constrain.position import Position
from k2jax.constrain.vocabulary import allow, forbid, list_ids

PIECE = 24  # tokens of the rest of a token's text, a character or an escape that was begun
TRIED = 64  # tokens that are tried near the end, of each kind
LONGEST = 8_000  # bytes of closing texts that are tried at a token, of each kind
POOL = 6  # closing texts that are tried for each
EFFORT = 4_000  # bytes that such a search tries
SEARCHES = 16  # of them, how many by a search


class JsonValue:
    """A value that is being written."""

    def __init__(self, schema: Schema):
        """Start before the value."""
        self._schema = schema
        self._words, self._shortest = schema.vocabulary, schema.shortest.begin()
        self._matcher = schema.matcher.deep_copy()
        self._bytes = schema.byte_matcher.deep_copy()  # lags behind by `_pending`
        self._position = Position()
        self._pending: list[int] = []
        self._opened = 0  # most brackets that the pending tokens may have opened
        self._closing: list[int] | None = list(schema.first)  # tokens that end the value
        self._plans: dict[int, list[int]] = {}  # the same after each token that was tried
        self._most = len(schema.first)  # tokens of a closing text, at most
        self._filled: int | None = None  # see `_count_filling`
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
        words = self._words
        mask = np.zeros(words.words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        for stop in words.stops:
            forbid(mask, stop)
        self._plans, self._filled = {}, None
        few = self._count_safe_brackets(room)
        if few >= words.most_opened:
            return mask
        closing = self._find_closing()
        few = self._count_safe_brackets(room)
        if few >= words.most_opened or closing is None:
            return mask
        if few < 0:
            return self._mask_near_end(mask, closing, room)
        mask &= words.few_opened[few]
        if closing and len(closing) <= room:
            allow(mask, closing[0])
        return mask

    def _count_safe_brackets(self, room: int) -> int:
        """How many brackets a token may open so that the value can be closed whatever it is.

        Below 0: not even a token that opens none is safe. What is open, what the token opens and
        what it begins then takes a level each; where the value's branch is determined, the closing
        text that was known last takes what it has, and each token since a level.
        """
        bounds = self._schema.bounds
        levels = (room - 1 - PIECE) // bounds.level - 1
        few = levels - self._position.depth - self._opened
        if bounds.determined and self._most < room:
            few = max(few, (room - 1 - PIECE - self._most) // bounds.level - 1)
        return few

    def accept(self, token: int) -> None:
        """Take a token.

        Raises:
            ValueError: the schema does not allow it here.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here")
        self._pending.append(token)
        opened = int(self._words.opened[token])
        self._opened += opened
        if token in self._plans:
            self._closing = self._plans[token]
        elif self._filled is not None and self._closing:
            self._closing = self._skip_filling(token, self._closing, self._filled)
        elif self._closing and self._closing[0] == token:
            self._closing = self._closing[1:]
        elif self._closing is not None and not self._ends_by(self._closing):
            self._closing = None
        if self._closing is None:
            self._most += self._schema.bounds.level * (1 + opened) + PIECE
        else:
            self._most = len(self._closing)
        self._plans, self._filled = {}, None

    def _skip_filling(self, token: int, closing: list[int], filling: int) -> list[int]:
        """The closing text after content that stands for some of its filling."""
        text = b"".join(self._words.tokens[i] for i in closing)
        return self._words.split(text[min(len(self._words.tokens[token].decode()), filling) :])

    def _catch_up(self) -> None:
        """Bring the bytes and the position to where the tokens are."""
        if not self._pending:
            return
        text = b"".join(self._words.tokens[token] for token in self._pending)
        self._bytes.consume_tokens(list(text))
        self._position.feed(text)
        self._pending, self._opened = [], 0

    def _find_closing(self) -> list[int] | None:
        """Tokens that end the value from here."""
        if self._closing is None:
            self._catch_up()
            text = self._shortest.complete(self._bytes, self._position)
            self._closing = None if text is None else self._words.split(text)
            self._most = len(self._closing) if self._closing is not None else self._most
        return self._closing

    def _mask_near_end(self, mask: np.ndarray, closing: list[int], room: int) -> np.ndarray:
        """Only tokens after which a closing text of the rest of `room` is known."""
        self._catch_up()
        near = np.zeros_like(mask)
        text = b"".join(self._words.tokens[i] for i in closing)
        self._filled = self._count_filling(text, mask)
        if self._filled is not None:
            places = [min(length, self._filled) for length in self._words.content]
            costs = self._words.count_ends(text, places)
            for cost, content in zip(costs, self._words.content.values(), strict=True):
                if cost <= room - 1:
                    near |= mask & content
                mask = mask & ~content
        self._searches = max(1, min(SEARCHES, LONGEST // (1 + len(text))))
        closings = [closing]
        for token in self._list_candidates(mask, len(text)):
            plan = self._plan(int(token), closings, room - 1)
            if plan is not None:
                self._plans[int(token)] = plan
                allow(near, int(token))
        if closing and len(closing) <= room:
            self._plans[closing[0]] = closing[1:]
            allow(near, closing[0])
        return near

    def _count_filling(self, closing: bytes, mask: np.ndarray) -> int | None:
        """Characters at the start of a closing text that only make a string long enough.

        Any content of as many characters can stand for them. None where the end is not in a
        string, or the string's content may matter: not every character is allowed, or patterns or
        unions may ask for more.
        """
        single = self._words.content[1]
        if not np.array_equal(mask & single, single):
            return None
        inside = self._position.inside == "string" and not self._position.escaped
        if not inside or not self._schema.bounds.plain:
            return None
        if not _is_whole(bytes(self._position.written)):
            return None
        filling = len(closing) - len(closing.lstrip(closing[:1].replace(b'"', b"")))
        filling = filling if closing[:1] != b'"' else 0
        fits = closing[filling : filling + 1] == b'"' and closing[:filling].isascii()
        return filling if fits and b"\\" not in closing[:filling] else None

    def _list_candidates(self, mask: np.ndarray, length: int) -> np.ndarray:
        """The tokens to try: all, or the commonest where there are many, and those with quotes."""
        tried = max(4, min(TRIED, LONGEST // (1 + length)))
        ids = list_ids(mask)
        if len(ids) <= tried:
            return ids
        closers = list_ids(mask & self._words.closers)[:tried]
        return np.unique(np.concatenate([ids[:tried], closers]))

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
        end = self._shortest.complete(matcher, position, EFFORT)
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
