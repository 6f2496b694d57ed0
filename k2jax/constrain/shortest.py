"""How a JSON value that was begun can be ended soon.

The search asks a matcher over single bytes which ones may come next, and so knows nothing of
schemas. It ends the innermost value first, then what encloses it, and takes the shortest text that
it sees at each: the sooner a value ends the better. Only of the members that may come next in an
object all are tried. What ended an object after a member is remembered and tried first when that
member is met again. The result is a text that the grammar accepts: it bounds the shortest one from
above, and in practice it is the shortest.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

from k2jax.constrain.position import (
    BACKSLASH,
    CLOSE_LIST,
    CLOSE_OBJECT,
    COLON,
    COMMA,
    OPEN_LIST,
    OPEN_OBJECT,
    QUOTE,
    SPACE,
    Position,
)
from k2jax.constrain.vocabulary import EOS_BYTE

ENDS = frozenset(b",]}") | {EOS_BYTE}
NARROW = 24  # bytes that are all tried
BEAM = 8  # unfinished texts that are kept
REPEATED = 2_000  # items of a list that are written at once
MOST_NAMES = 256  # of members that are tried
EFFORT = 100_000  # bytes tried before the search gives up
ESCAPE = re.compile(rb"(?<!\\)(\\\\)*\\(u[0-9a-fA-F]{0,3})?\Z")  # one that is not complete
FEW = 4  # bytes of a scalar that no object or list is worth trying to beat


class TooHard(Exception):
    """The search gave up."""


class Shortest:
    """Ends JSON values of one grammar."""

    def __init__(
        self, fillers: bytes, hints: tuple[bytes, ...] = (), required: tuple[bytes, ...] = ()
    ):
        """Know no way yet.

        Args:
            fillers: characters for strings that must be long, best first.
            hints: contents of strings that the grammar may ask for.
            required: names of members that it may ask for.
        """
        self._fillers = fillers
        ends = {hint[at:] + b'"' for hint in hints for at in range(len(hint))}
        self._ends = sorted(ends, key=len)  # of strings
        self._required = required
        self._known: dict[tuple[bytes, ...], bytes] = {}
        self._allowed: dict[bytes, tuple[int, ...]] = {}
        self._chosen: dict[tuple[int, ...], list[int]] = {}
        self._effort = 0

    def begin(self) -> "Shortest":
        """One for a value of its own, so that how it is closed depends on that value alone."""
        other = copy.copy(self)
        other._known = {}
        return other

    def complete(self, matcher: Any, position: Position, effort: int = EFFORT) -> bytes | None:
        """A short text that ends the value; None where none was found.

        Args:
            matcher: over bytes, at the end of the text so far; it is not changed.
            position: of that end.
            effort: bytes to try before giving up.
        """
        self._effort = effort
        try:
            return self._complete(matcher.deep_copy(), position)
        except (TooHard, RecursionError):
            return None

    def _complete(self, matcher: Any, position: Position) -> bytes | None:
        names, opened = list(position.names), position.opened
        text, after_colon = b"", position.after_colon
        if position.inside == "name":
            text, matcher = self._member_from_name(matcher, names, bytes(position.written))
        elif position.inside == "string":
            text, matcher = self._end_string(matcher)
        elif position.inside == "scalar":
            text, matcher = self._search(matcher, ENDS)
        elif after_colon or not opened:
            if opened or EOS_BYTE not in self._next(matcher):
                colon = COLON in self._next(matcher)
                if colon:
                    self._take(matcher, COLON)
                value, matcher = self._value(matcher, tuple(names), EFFORT)
                text = b":" * colon + value
        elif self._next(matcher) == (COLON,):
            self._take(matcher, COLON)
            value, matcher = self._value(matcher, tuple(names), EFFORT)
            text = b":" + value
        for level in range(len(opened) - 1, -1, -1):
            path = tuple(names[: level + 1])
            end, matcher = self._close(matcher, opened[level], path, EFFORT)
            text += end
        return text if matcher.is_accepting() else None

    def _next(self, matcher: Any) -> tuple[int, ...]:
        """The bytes that may come next, and EOS_BYTE."""
        mask = matcher.compute_bitmask()
        allowed = self._allowed.get(mask)
        if allowed is None:
            bits = int.from_bytes(mask, "little")
            allowed = tuple(i for i in range(EOS_BYTE + 1) if bits >> i & 1)
            self._allowed[mask] = allowed
        return allowed

    def _take(self, matcher: Any, byte: int) -> None:
        self._effort -= 1
        if self._effort < 0 or not matcher.consume_token(byte):
            raise TooHard

    def _search(
        self, matcher: Any, ends: frozenset[int], starts: Sequence[int] = ()
    ) -> tuple[bytes, Any]:
        """The shortest text until one of `ends` may come, and the matcher there.

        Args:
            matcher: where the text begins; it is not changed.
            ends: not part of the text.
            starts: bytes that the text may begin with; (): any, or none at all.
        """
        if not starts and not ends.isdisjoint(self._next(matcher)):
            return b"", matcher
        frontier = [(b"", matcher, starts or self._choices(self._next(matcher)))]
        while frontier:
            reached: dict[tuple[bytes, bool], tuple[bytes, Any]] = {}
            for text, here, choices in frontier:
                before, many = here.compute_bitmask(), len(choices) > NARROW
                for byte in choices:
                    child = here.deep_copy()
                    self._take(child, byte)
                    if not ends.isdisjoint(self._next(child)):
                        return text + bytes([byte]), child
                    mask = child.compute_bitmask()
                    known = (mask, False) in reached  # the first and the last of each mask
                    reached[mask, known] = text + bytes([byte]), child
                    if many and mask == before:
                        break  # anything may come, only more of it
            few = list(reached.values())[:BEAM]
            if ends == {QUOTE} and (hit := self._hinted(few)):
                return hit
            frontier = [(text, here, self._choices(self._next(here))) for text, here in few]
        raise TooHard

    def _hinted(self, few: list[tuple[bytes, Any]]) -> tuple[bytes, Any] | None:
        """One of the texts that a hint can end."""
        return next((item for item in few if self._fitting_hint(item[1])), None)

    def _choices(self, allowed: tuple[int, ...]) -> list[int]:
        """The bytes that are worth trying, best first."""
        chosen = self._chosen.get(allowed)
        if chosen is None:
            plain = [byte for byte in allowed if byte not in (QUOTE, BACKSLASH, EOS_BYTE)]
            readable = [byte for byte in plain if 0x20 <= byte < 0x7F]
            if len(plain) > NARROW:
                plain = readable or plain[:4]
            chosen = sorted(plain, key=self._rank) or [b for b in allowed if b == BACKSLASH]
            self._chosen[allowed] = chosen
        return chosen

    def _rank(self, byte: int) -> int:
        at = self._fillers.find(byte)
        return at if at >= 0 else len(self._fillers) + byte

    def _end_string(self, matcher: Any) -> tuple[bytes, Any]:
        """The shortest rest of a string, with its quote, and the matcher behind it."""
        if QUOTE not in self._next(matcher) and (end := self._fitting_hint(matcher)):
            matcher.consume_tokens(list(end))
            return end, matcher
        text, matcher = self._search(matcher, frozenset({QUOTE}))
        if QUOTE in self._next(matcher):
            self._take(matcher, QUOTE)
            return text + b'"', matcher
        end = self._fitting_hint(matcher)
        matcher.consume_tokens(list(end))
        return text + end, matcher

    def _fitting_hint(self, matcher: Any) -> bytes:
        """The shortest end of a hint that ends the string, with its quote; b"" if none does."""
        return next((end for end in self._ends if self._accepts(matcher, end)), b"")

    def _value(self, matcher: Any, path: tuple[bytes, ...], limit: int) -> tuple[bytes, Any]:
        """The shortest value, and the matcher behind it.

        Raises:
            TooHard: none has fewer than `limit` bytes.
        """
        allowed = self._next(matcher)
        best: tuple[bytes, Any] | None = None
        if scalars := [b for b in allowed if b not in SPACE and b not in b'"{[' and b != EOS_BYTE]:
            best = self._search(matcher, ENDS, scalars)
        if QUOTE in allowed and not (best and len(best[0]) <= 1):
            here = matcher.deep_copy()
            self._take(here, QUOTE)
            end, here = self._end_string(here)
            if best is None or len(end) + 1 < len(best[0]):
                best = b'"' + end, here
        for bracket in (OPEN_LIST, OPEN_OBJECT):
            if bracket in allowed and not (best and len(best[0]) <= FEW):
                most = min(limit, len(best[0]) if best else limit)
                best = self._container(matcher, bracket, path, most) or best
        if best is None or len(best[0]) >= limit:
            raise TooHard
        return best

    def _container(
        self, matcher: Any, bracket: int, path: tuple[bytes, ...], limit: int
    ) -> tuple[bytes, Any] | None:
        """The shortest list or object of fewer than `limit` bytes, if there is one."""
        if limit <= 2:
            return None
        here = matcher.deep_copy()
        self._take(here, bracket)
        try:
            end, here = self._close(here, bracket, (*path, b""), limit - 1)
        except TooHard:
            if self._effort < 0:
                raise
            return None
        return bytes([bracket]) + end, here

    def _close(
        self, matcher: Any, bracket: int, path: tuple[bytes, ...], limit: int
    ) -> tuple[bytes, Any]:
        """The shortest rest of a list or object, and the matcher behind it.

        Raises:
            TooHard: none has fewer than `limit` bytes.
        """
        known = self._known.get((bytes([bracket]), *path))
        if known and len(known) < limit and self._accepts(matcher, known):
            matcher.consume_tokens(list(known))
            return known, matcher
        end = self._close_list if bracket == OPEN_LIST else self._close_object
        text, matcher = end(matcher, path, limit)
        if path[-1]:
            self._known[(bytes([bracket]), *path)] = text
        return text, matcher

    def _accepts(self, matcher: Any, text: bytes) -> bool:
        return bool(matcher.validate_tokens(list(text)) == len(text))

    def _close_list(self, matcher: Any, path: tuple[bytes, ...], limit: int) -> tuple[bytes, Any]:
        text = b""
        while CLOSE_LIST not in (allowed := self._next(matcher)):
            if COMMA in allowed:
                self._take(matcher, COMMA)
                text += b","
            value, matcher = self._value(matcher, path, limit - len(text))
            text += value
            if CLOSE_LIST not in self._next(matcher):
                again = self._repeat(matcher, b"," + value)
                matcher.consume_tokens(list(again))
                text += again
        self._take(matcher, CLOSE_LIST)
        return text + b"]", matcher

    def _repeat(self, matcher: Any, item: bytes) -> bytes:
        """The fewest repetitions of `item` after which a list may end; b"" if none are enough."""
        most = matcher.validate_tokens(list(item * FEW)) // len(item)
        if most == FEW:
            most = matcher.validate_tokens(list(item * REPEATED)) // len(item)
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            if self._accepts(matcher, item * middle + b"]"):
                high = middle
            else:
                low = middle + 1
        return item * low if most and self._accepts(matcher, item * low + b"]") else b""

    def _close_object(self, matcher: Any, path: tuple[bytes, ...], limit: int) -> tuple[bytes, Any]:
        text = b""
        while CLOSE_OBJECT not in (allowed := self._next(matcher)):
            if COMMA in allowed:
                self._take(matcher, COMMA)
                text += b","
            self._take(matcher, QUOTE)
            text += b'"'
            names = self._names(matcher)
            if len(names) != 1:
                rest, matcher = self._members(names, path, b"", limit - len(text))
                return text + rest, matcher
            name, matcher = names[0]
            self._take(matcher, COLON)
            path = (*path[:-1], name)
            value, matcher = self._value(matcher, path, limit - len(text) - len(name) - 2)
            text += name + b'":' + value
        self._take(matcher, CLOSE_OBJECT)
        return text + b"}", matcher

    def _members(
        self, names: list[tuple[bytes, Any]], path: tuple[bytes, ...], begun: bytes, limit: int
    ) -> tuple[bytes, Any]:
        """The shortest rest of an object from inside of a member's name, one of `names`."""
        best: tuple[bytes, Any] | None = None
        for name, behind in names:
            where = (*path[:-1], begun + name)
            most = min(limit, len(best[0]) if best else limit) - len(name) - 2
            try:
                self._take(behind, COLON)
                value, here = self._value(behind, where, most)
                end, here = self._close(here, OPEN_OBJECT, where, most - len(value))
            except TooHard:
                if self._effort < 0:
                    raise
                continue
            text = name + b'":' + value + end
            if best is None or len(text) < len(best[0]):
                best = text, here
        if best is None:
            raise TooHard
        return best

    def _member_from_name(
        self, matcher: Any, names: list[bytes], begun: bytes
    ) -> tuple[bytes, Any]:
        """The shortest rest of the name that was begun and its value, and the matcher there."""
        best: tuple[int, bytes, Any, bytes] | None = None
        for name, behind in self._names(matcher, begun):
            where = (*names[:-1], begun + name)
            most = best[0] - len(name) - 2 if best else EFFORT
            try:
                self._take(behind, COLON)
                value, here = self._value(behind, where, most)
                end, _ = self._close(here.deep_copy(), OPEN_OBJECT, where, most - len(value))
            except TooHard:
                if self._effort < 0:
                    raise
                continue
            text = name + b'":' + value
            if best is None or len(text) + len(end) < best[0]:
                best = len(text) + len(end), text, here, begun + name
        if best is None:
            raise TooHard
        names[-1] = best[3]
        return best[1], best[2]

    def _names(self, matcher: Any, begun: bytes = b"") -> list[tuple[bytes, Any]]:
        """Rests of names to try here, and matchers behind their quotes.

        What some object requires comes sooner to the end than what none does.
        """
        out = []
        for name in self._required:
            rest = name[len(begun) :] + b'"'
            if name.startswith(begun) and self._accepts(matcher, rest + b":"):
                behind = matcher.deep_copy()
                behind.consume_tokens(list(rest))
                self._effort -= len(rest)
                out.append((rest[:-1], behind))
        return out or self._list_names(matcher, begun)

    def _list_names(self, matcher: Any, begun: bytes) -> list[tuple[bytes, Any]]:
        """Rests of all names that may be written here, and matchers behind their quotes."""
        out: list[tuple[bytes, Any]] = []
        waiting = [(b"", matcher)]
        while waiting and len(out) < MOST_NAMES:
            text, here = waiting.pop(0)
            allowed = self._next(here)
            if QUOTE in allowed:
                behind = here.deep_copy()
                self._take(behind, QUOTE)
                out.append((text, behind))
            choices = self._choices(allowed)
            if len(allowed) > NARROW or ESCAPE.search(begun + text):
                choices = [] if QUOTE in allowed else choices[:1]  # any name: one will do
            for byte in choices:
                child = here.deep_copy()
                self._take(child, byte)
                waiting.append((text + bytes([byte]), child))
        return out
