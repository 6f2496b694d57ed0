"""A model's answer: thought, text and tool calls, taken from token ids as they come.

Control tokens are told apart by their ids, so text that spells them stays text.
Source: [K2-TOOL] (spec 5.3), without its weak points (trap 27); `deepseek.py` for DeepSeek's.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from k2jax.text import deepseek
from k2jax.text import kimi_template as marks
from k2jax.text.incremental_decode import TextStream
from k2jax.text.interface import TokenizerLike
from k2jax.text.messages import function_name
from k2jax.text.stop_text import StopText, overlap

# Control tokens by what they do, Kimi's and DeepSeek's.
CALLS, END_CALLS = (marks.CALLS.text, deepseek.CALLS), (marks.END_CALLS.text, deepseek.END_CALLS)
CALL, END_CALL = (marks.CALL.text, deepseek.CALL), (marks.END_CALL.text, deepseek.END_CALL)
ARGUMENTS = (marks.ARGUMENTS.text, deepseek.SEPARATOR)
ROLES = (marks.USER.text, marks.ASSISTANT.text, marks.SYSTEM.text)
IN_CALLS = ("section", "id", "arguments")
# What marks enclose where they have no meaning is no content either.
DROPPED = ("section", "stray call", "head", "other turn")
TAIL = 16  # tokens of a prompt that are looked at for an open thought


class Call(NamedTuple):
    """One tool call."""

    id: str  # as the model wrote it; DeepSeek's write none, theirs count on from the prompt
    name: str
    arguments: str  # should be a JSON object; what the model wrote
    complete: bool  # the model ended it, and named a function

    def message(self) -> dict[str, Any]:
        """As the OpenAI API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class Reply(NamedTuple):
    """A whole answer."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]

    def message(self) -> dict[str, Any]:
        """The assistant's message for a conversation; calls that were not ended are left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if calls := [call.message() for call in self.calls if call.complete]:
            message["tool_calls"] = calls
        return message


class Delta(NamedTuple):
    """A bit of an answer."""

    kind: str  # "reasoning", "content", "call" (one begins; its id) or "arguments"
    text: str
    call: int = -1  # number of the call in this answer, from 0


def parse(tokenizer: TokenizerLike, ids: Iterable[int], prompt: Sequence[int] = ()) -> Reply:
    """Read generated ids as an answer.

    Args:
        tokenizer: of the model.
        ids: generated ones; what follows an id that ends the reply is ignored.
        prompt: what the model read before; some templates begin its thought there.
    """
    stream = ReplyStream(tokenizer, prompt)
    stream.feed(ids)
    stream.close()
    return stream.reply()


@dataclasses.dataclass
class _Open:
    """A call that is being read."""

    id: str = ""
    arguments: str = ""
    held: str = ""  # white space, which may be the end
    complete: bool = False
    written: deepseek.Written | None = None


class ReplyStream:
    """Reads an answer in any portions of ids; nothing it emits is ever taken back.

    Attributes:
        ended: by an id that ends replies, by a stop text, or by `close`.
    """

    def __init__(
        self, tokenizer: TokenizerLike, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ):
        """Start before the first generated id.

        Args:
            tokenizer: of the model.
            prompt: as for `parse`.
            stop: texts before which the content ends, and the answer with it. Thoughts and calls
                may have them.
        """
        self._tokenizer = tokenizer
        self._names = {id_: name for name, id_ in tokenizer.specials.items()}
        self._text = TextStream(tokenizer)
        opened = tokenizer.decode(prompt[-TAIL:]).rstrip().endswith(marks.THINK.text)
        past = tokenizer.specials.get(deepseek.CALL)
        self._before = sum(id_ == past for id_ in prompt)  # calls of DeepSeek's in the prompt
        # "start" (a thought may begin), "reasoning", "content", "section", "id", "arguments"; and
        # text that is dropped: "stray call", "head" of a turn, "other turn" than the assistant's
        self._state = "reasoning" if opened else "start"
        self._held = ""  # may become the mark that ends or begins a thought
        self._texts = {"reasoning": "", "content": ""}
        self._calls: list[_Open] = []
        self._stop = StopText(stop)
        self.ended = False

    @property
    def stopped_by(self) -> str:
        """The stop text that ended the answer; "" none did."""
        return self._stop.matched

    def feed(self, ids: Iterable[int]) -> list[Delta]:
        """Take ids; the bits that they add to the answer."""
        out: list[Delta] = []
        for id_ in map(int, ids):
            if self.ended:
                break
            name = self._names.get(id_)
            if name is None:
                out += self._add(self._text.feed([id_]))
                continue
            out += self._add(self._text.close())
            self._text = TextStream(self._tokenizer)
            if not self.ended:
                self.ended = id_ in self._tokenizer.stops
                out += self._mark(name)
        return out

    def close(self) -> list[Delta]:
        """End the answer; the bits that were held back."""
        if self.stopped_by:
            return []
        self.ended = True
        return [*self._add(self._text.close()), *self._release()]

    def reply(self) -> Reply:
        """The answer so far; complete after `close`."""
        calls = tuple(_close(call) for call in self._calls)
        return Reply(self._texts["content"], self._texts["reasoning"], calls)

    def _mark(self, name: str) -> list[Delta]:
        """A control token."""
        if name in marks.SPELLED_OUT:
            return self._add(name)
        out = self._release()
        if self._state in IN_CALLS:
            return [*out, *self._mark_in_calls(name)]
        if name in CALLS:
            self._state = "section"
        elif name in CALL or name in ARGUMENTS:
            self._state = "stray call"
        elif name in ROLES:
            self._state = "head" if name == marks.ASSISTANT.text else "other turn"
        elif self._state == "head" and name == marks.MIDDLE.text:
            self._state = "content" if any(self._texts.values()) else "start"
        elif self._state == "stray call" and name in (*END_CALL, *END_CALLS):
            self._state = "content"
        return out

    def _mark_in_calls(self, name: str) -> list[Delta]:
        """A control token in a section of calls."""
        out: list[Delta] = []
        if name in CALL:
            self._calls.append(_Open())
            self._state = "id"
        elif name == marks.ARGUMENTS.text and self._state == "id":
            out.append(Delta("call", self._calls[-1].id.strip(), len(self._calls) - 1))
            self._state = "arguments"
        elif name == deepseek.SEPARATOR and self._state == "id":
            self._calls[-1].written = deepseek.Written(self._calls[-1].id)
            self._calls[-1].id = ""
            self._state = "arguments"
            out += self._argue("")
        elif name in END_CALL:
            out += self._end_call() if self._state == "arguments" else []
            self._state = "section"
        elif name in (*END_CALLS, *ROLES):
            self._state = "content" if name in END_CALLS else "other turn"
        return out

    def _add(self, text: str) -> list[Delta]:
        """Text, to where the answer is."""
        if not text or self._state in DROPPED:
            return []
        if self._state == "id":
            self._calls[-1].id += text
            return []
        if self._state == "arguments":
            return self._argue(text)
        return self._think(text)

    def _argue(self, text: str) -> list[Delta]:
        """Text inside of a call."""
        call, number, out = self._calls[-1], len(self._calls) - 1, []
        if call.written is not None:
            text = call.written.feed(text)
            if call.written.name and not call.id:
                call.id = f"functions.{call.written.name}:{self._before + number}"
                out.append(Delta("call", call.id, number))
        if text := self._trim(call, text):
            call.arguments += text
            out.append(Delta("arguments", text, number))
        return out

    @staticmethod
    def _trim(call: _Open, text: str) -> str:
        """What can be passed on of arguments: no white space before and behind them."""
        text = call.held + text if call.arguments else text.lstrip()
        kept = text.rstrip()
        call.held = text[len(kept) :]
        return kept

    def _end_call(self) -> list[Delta]:
        """The model ended a call."""
        call, number = self._calls[-1], len(self._calls) - 1
        call.complete = bool(function_name(call.id))
        text = call.written.close() if call.written is not None and call.id else ""
        text = self._trim(call, text)
        call.arguments += text
        return [Delta("arguments", text, number)] if text else []

    def _think(self, text: str) -> list[Delta]:
        """Text outside of calls: a thought, in its marks, may come first."""
        text, self._held = self._held + text, ""
        if self._state == "start":
            begun = text.lstrip()
            if not begun or (len(begun) < len(marks.THINK.text) and _begins(begun)):
                self._held = text
                return []
            thinks = begun.startswith(marks.THINK.text)
            self._state = "reasoning" if thinks else "content"
            text = begun.removeprefix(marks.THINK.text) if thinks else text
        if self._state == "reasoning":
            thought, end, rest = text.partition(marks.END_THINK.text)
            if end:
                self._state = "content"
                return [*self._emit("reasoning", thought), *self._emit("content", rest)]
            keep = overlap(text, marks.END_THINK.text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return self._emit(self._state, text)

    def _release(self) -> list[Delta]:
        """What was held back was neither a mark nor a stop text."""
        text, self._held = self._held, ""
        if self._state == "start":
            self._state = "content"
        out = self._emit(self._state, text) if text else []
        text = self._stop.close()
        self._texts["content"] += text
        return [*out, Delta("content", text)] if text else out

    def _emit(self, kind: str, text: str) -> list[Delta]:
        if kind == "content":
            text = self._stop.feed(text)
            self.ended |= bool(self._stop.matched)
        self._texts[kind] += text
        return [Delta(kind, text)] if text else []


def _begins(text: str) -> bool:
    return marks.THINK.text.startswith(text)


def _close(call: _Open) -> Call:
    return Call(call.id.strip(), function_name(call.id), call.arguments, call.complete)
