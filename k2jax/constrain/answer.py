"""An assistant's answer, token by token: thought, text or JSON, sections of calls.

Control tokens and what stands around JSON are an automaton of a few states, each of which knows the
fewest tokens from there to the end. A token may come if what must follow it still fits: a call
begins only where it can be completed, a thought ends while there is room for what must follow it.
Source of the form of calls: [K2-TOOL] (spec 5.3).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from k2jax.config import ConfigError
from k2jax.constrain.json_schema import Schema
from k2jax.constrain.json_value import JsonValue
from k2jax.constrain.literal import Literal
from k2jax.constrain.vocabulary import Vocabulary, allow
from k2jax.text import kimi_template as marks

THINK, END_THINK = marks.THINK.text.encode(), marks.END_THINK.text.encode()
STOP = 1  # tokens that end a reply
IN_SECTIONS = (marks.END_CALLS, marks.CALL, marks.END_CALL, marks.ARGUMENTS)


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that may be called."""

    name: str
    arguments: Schema


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an answer may be.

    Attributes:
        words: the tokens.
        tools: what may be called; empty: nothing.
        must_call: the answer is a section of calls.
        many: a section may have more than one.
        content: schema of the text; None: any text, unless `must_call`.
        thinks: "no", "may": a thought may come first, "open": the prompt began one.
    """

    words: Vocabulary
    tools: Sequence[Tool] = ()
    must_call: bool = False
    many: bool = True
    content: Schema | None = None
    thinks: str = "no"

    def id_of(self, part: marks.Part) -> int:
        """The id of a control token."""
        return self.words.specials[part.text]

    def least_call(self, index: int) -> int:
        """Tokens of the shortest call and its marks."""
        names = [self.words.count(tool_id(tool.name, index)) for tool in self.tools]
        costs = [n + tool.arguments.least for n, tool in zip(names, self.tools, strict=True)]
        return 3 + min(costs)

    def least_section(self, index: int) -> int:
        """Tokens of the shortest section of calls and of the end."""
        return 2 + self.least_call(index) + STOP

    def least_answer(self, index: int) -> int:
        """Tokens of the shortest answer without a thought."""
        least = [self.least_section(index)] if self.tools else []
        if self.content is not None and not self.must_call:
            least.append(self.content.least + STOP)
        return min(least)

    @functools.cached_property
    def end_thought(self) -> int:
        """Tokens of the mark that ends a thought."""
        return 1 if marks.END_THINK.text in self.words.specials else self.words.count(END_THINK)

    @functools.cached_property
    def stop_mask(self) -> np.ndarray:
        """Only what ends the reply."""
        return self.words.pack(self.words.stops)

    @functools.cached_property
    def free_mask(self) -> np.ndarray:
        """Anything but the marks of calls."""
        inside = [self.words.specials.get(part.text) for part in (marks.CALLS, *IN_SECTIONS)]
        return ~self.words.pack(i for i in inside if i is not None)

    @functools.cached_property
    def calling_mask(self) -> np.ndarray:
        """The same with the mark that begins a section."""
        mask = self.free_mask.copy()
        allow(mask, self.id_of(marks.CALLS))
        return mask


def tool_id(name: str, index: int) -> bytes:
    """What a call of a function is called."""
    return f"functions.{name}:{index}".encode()


class State(Protocol):
    """Where in an answer its end is."""

    def mask(self, left: int) -> np.ndarray:
        """Tokens that may come next, of the `left` that there may be."""

    def accept(self, token: int) -> "State":
        """Take a token."""


class Answer:
    """An answer that is being written: the constraint of one sequence."""

    def __init__(self, rules: Rules, first_index: int = 0):
        """Stand before the first token.

        Args:
            rules: what it may be.
            first_index: of its first call, counted over the conversation.
        """
        self._state: State
        if rules.content is None and not rules.must_call:
            self._state, self._least = _Free(rules, first_index), 1
            return
        self._least = rules.least_answer(first_index)
        self._state = _Head(rules, first_index)
        if rules.thinks == "may":
            self._state = _First(rules, first_index)
        if rules.thinks == "open":
            self._state = _Thought(rules, first_index)
            self._least += rules.end_thought
        self._left = self._least

    def start(self, max_new_tokens: int) -> None:
        """Begin, with at most so many tokens to come, the one that ends the reply included.

        Raises:
            ConfigError: the answer cannot be completed with so few.
        """
        if max_new_tokens < self._least:
            raise ConfigError(
                f"max_tokens is {max_new_tokens}; the shortest answer that the request's tools and "
                f"response_format allow has {self._least} tokens"
            )
        self._left = max_new_tokens

    @property
    def least(self) -> int:
        """Tokens of the shortest answer, the one that ends the reply included."""
        return self._least

    def mask(self) -> np.ndarray:
        """Tokens that may come next: uint32 [ceil(vocab / 32)]; not to be written to."""
        return self._state.mask(self._left)

    def accept(self, token: int) -> None:
        """Take a token.

        Raises:
            ValueError: it may not come here.
        """
        self._state = self._state.accept(int(token))
        self._left -= 1


class _Base:
    """What most states know."""

    def __init__(self, rules: Rules, index: int):
        self._rules, self._words, self._index = rules, rules.words, index

    def _only(self, *parts: marks.Part) -> np.ndarray:
        return self._words.pack([self._rules.id_of(part) for part in parts])

    def _expect(self, token: int, part: marks.Part) -> None:
        if token != self._rules.id_of(part):
            raise ValueError(f"token {token} is not allowed here, where {part.text} must come")


class _Free(_Base):
    """Any text, until a section begins."""

    def mask(self, left: int) -> np.ndarray:
        if self._rules.tools and left >= self._rules.least_section(self._index):
            return self._rules.calling_mask
        return self._rules.free_mask

    def accept(self, token: int) -> State:
        if self._rules.tools and token == self._rules.id_of(marks.CALLS):
            return _Section(self._rules, self._index)
        return self


class _Head(_Base):
    """Before a section or JSON."""

    def mask(self, left: int) -> np.ndarray:
        rules, mask = self._rules, np.zeros(self._words.words, np.uint32)
        if rules.content is not None and not rules.must_call and left > rules.content.least:
            mask = JsonValue(rules.content).mask(left - STOP)
        if rules.tools and left >= rules.least_section(self._index):
            allow(mask, rules.id_of(marks.CALLS))
        return mask

    def accept(self, token: int) -> State:
        if self._rules.tools and token == self._rules.id_of(marks.CALLS):
            return _Section(self._rules, self._index)
        if self._rules.content is None or self._rules.must_call:
            raise ValueError(f"token {token} is not allowed here, where calls must come")
        return _Content(self._rules, self._index).accept(token)


class _First(_Base):
    """Before all: a thought may begin."""

    def __init__(self, rules: Rules, index: int):
        super().__init__(rules, index)
        self._head = _Head(rules, index)
        self._mark: Literal | None = None  # the mark that begins a thought, where it is text
        self._think = self._words.specials.get(marks.THINK.text)

    def mask(self, left: int) -> np.ndarray:
        after = self._rules.end_thought + self._rules.least_answer(self._index)
        if self._mark is not None:
            return self._mark.mask(left, {0: after})
        mask = self._head.mask(left)
        if self._think is None:
            mask = mask | Literal(self._words, {0: THINK}).mask(left, {0: after})
        elif left >= 1 + after:
            allow(mask, self._think)
        return mask

    def accept(self, token: int) -> State:
        if token == self._think:
            return _Thought(self._rules, self._index)
        if self._mark is None and not THINK.startswith(self._words.tokens[token] or b" "):
            return self._head.accept(token)
        self._mark = self._mark or Literal(self._words, {0: THINK})
        self._mark.accept(token)
        return _Thought(self._rules, self._index) if self._mark.completed else self


class _Thought(_Base):
    """A thought that something must follow."""

    def __init__(self, rules: Rules, index: int):
        super().__init__(rules, index)
        self._tail = b""  # what may be the beginning of the mark that ends it
        self._mark: Literal | None = None  # the same when there is room for nothing else
        self._end = self._words.specials.get(marks.END_THINK.text)

    def mask(self, left: int) -> np.ndarray:
        after = self._rules.least_answer(self._index)
        if self._mark is None and left > self._rules.end_thought + after:
            mask = self._words.text & ~self._words.passing(END_THINK, self._tail)
            if self._end is not None:
                allow(mask, self._end)
            return mask
        if self._end is not None:
            return self._words.pack([self._end])
        self._mark = self._mark or Literal(self._words, {0: END_THINK})
        return self._mark.mask(left, {0: after})

    def accept(self, token: int) -> State:
        text = self._words.tokens[token]
        if not text and token != self._end:
            raise ValueError(f"token {token} is not allowed in a thought")
        if self._mark is not None:
            self._mark.accept(token)
        self._tail += text
        if token == self._end or self._tail.endswith(END_THINK):
            return _Head(self._rules, self._index)
        self._tail = self._tail[1 - len(END_THINK) :]
        return self


class _Section(_Base):
    """Before the first call of a section."""

    def mask(self, left: int) -> np.ndarray:
        return self._only(marks.CALL)

    def accept(self, token: int) -> State:
        self._expect(token, marks.CALL)
        return _Name(self._rules, self._index)


class _Name(_Base):
    """In a call, before its arguments."""

    def __init__(self, rules: Rules, index: int):
        super().__init__(rules, index)
        names = {i: tool_id(tool.name, index) for i, tool in enumerate(rules.tools)}
        # The arguments' mark, the arguments, the ends of call, section and reply.
        self._after = {i: 4 + tool.arguments.least for i, tool in enumerate(rules.tools)}
        self._literal = Literal(self._words, names)

    def mask(self, left: int) -> np.ndarray:
        mask = self._literal.mask(left, self._after)
        if any(self._after[i] <= left for i in self._literal.completed):
            allow(mask, self._rules.id_of(marks.ARGUMENTS))
        return mask

    def accept(self, token: int) -> State:
        if token != self._rules.id_of(marks.ARGUMENTS):
            self._literal.accept(token)
            return self
        if not self._literal.completed:
            raise ValueError("arguments may not begin inside of a name")
        schema = self._rules.tools[self._literal.completed[0]].arguments
        return _Arguments(self._rules, self._index, JsonValue(schema))


class _Arguments(_Base):
    """In a call's arguments."""

    def __init__(self, rules: Rules, index: int, value: JsonValue):
        super().__init__(rules, index)
        self._value = value

    def mask(self, left: int) -> np.ndarray:
        mask = self._value.mask(left - 2 - STOP)
        if self._value.is_complete:
            allow(mask, self._rules.id_of(marks.END_CALL))
        return mask

    def accept(self, token: int) -> State:
        if token != self._rules.id_of(marks.END_CALL):
            self._value.accept(token)
            return self
        if not self._value.is_complete:
            raise ValueError("arguments may not end here")
        return _AfterCall(self._rules, self._index + 1)


class _AfterCall(_Base):
    """Between calls."""

    def mask(self, left: int) -> np.ndarray:
        rules = self._rules
        if rules.many and left >= rules.least_call(self._index) + 1 + STOP:
            return self._only(marks.END_CALLS, marks.CALL)
        return self._only(marks.END_CALLS)

    def accept(self, token: int) -> State:
        if self._rules.many and token == self._rules.id_of(marks.CALL):
            return _Name(self._rules, self._index)
        self._expect(token, marks.END_CALLS)
        return _Ended(self._rules, self._index)


class _Content(_Base):
    """In an answer that is JSON."""

    def __init__(self, rules: Rules, index: int):
        super().__init__(rules, index)
        assert rules.content is not None
        self._value = JsonValue(rules.content)

    def mask(self, left: int) -> np.ndarray:
        mask = self._value.mask(left - STOP)
        return mask | self._rules.stop_mask if self._value.is_complete else mask

    def accept(self, token: int) -> State:
        if token in self._words.stops and self._value.is_complete:
            return _Ended(self._rules, self._index)
        self._value.accept(token)
        return self


class _Ended(_Base):
    """After everything."""

    def mask(self, left: int) -> np.ndarray:
        return self._rules.stop_mask

    def accept(self, token: int) -> State:
        if token not in self._words.stops:
            raise ValueError(f"token {token} is not allowed here, where the reply must end")
        return self
