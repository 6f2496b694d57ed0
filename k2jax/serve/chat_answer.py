"""A chat's answer: what the engine says of one choice becomes deltas; deltas joined, a message."""

from collections.abc import Iterator, Mapping
from typing import Any

from k2jax.inference.request import Output, TokenLogprob
from k2jax.serve.ask import ChatAsk
from k2jax.serve.choice import Choice, Piece
from k2jax.serve.token_text import chat_entry
from k2jax.text.interface import TokenizerLike
from k2jax.text.messages import function_name
from k2jax.text.reply import Delta, ReplyStream

# Both names that clients know for a thought.
THOUGHT = ("reasoning_content", "reasoning")


class ChatChoice(Choice):
    """Reads one choice, token by token."""

    def __init__(self, tokenizer: TokenizerLike, ask: ChatAsk, prompt: tuple[int, ...]):
        super().__init__()
        self._tokenizer, self._ask = tokenizer, ask
        self._reply = ReplyStream(tokenizer, prompt, ask.stop)
        self._calls: dict[int, int] = {}  # number among those reported, by that in the reply
        self._entries: list[TokenLogprob] = []

    def feed(self, output: Output) -> list[Piece]:
        """The pieces that an event adds; the last has a `finish_reason`."""
        if self.complete:
            return []
        deltas: list[Delta] = []
        stopped = output.finish_reason == "stop" and isinstance(output.stopped_by, int)
        for place, id_ in enumerate(output.ids):
            self.tokens += 1
            self._entries += output.logprobs[place : place + 1]
            if not (stopped and place == len(output.ids) - 1):
                deltas += self._reply.feed([id_])
            if self._reply.stopped_by:
                break
        finish = "stop" if self._reply.stopped_by else output.finish_reason
        if finish is not None:
            deltas += self._reply.close()
        pieces: list[Piece] = [{"delta": delta} for delta in self._join(deltas)]
        if finish is not None:
            self.error = output.error
            self.finish_reason = self._name_end(finish)
            pieces.append({"delta": {}, "finish_reason": self.finish_reason})
        return self._add_logprobs(pieces)

    def _name_end(self, finish: str) -> str:
        """An answer that ended itself after calls ended because of them."""
        return "tool_calls" if finish == "stop" and self._calls else finish

    def _add_logprobs(self, pieces: list[Piece]) -> list[Piece]:
        if self._ask.top is not None and pieces:
            entries = [chat_entry(self._tokenizer, e, self._ask.top) for e in self._entries]
            self._entries = []
            pieces[0]["logprobs"] = {"content": entries, "refusal": None}
        return pieces

    def _join(self, deltas: list[Delta]) -> Iterator[dict[str, Any]]:
        """Deltas of the API; texts of one kind that follow each other are one."""
        joined: list[Delta] = []
        for delta in deltas:
            last = joined[-1] if joined else None
            if last and (last.kind, last.call) == (delta.kind, delta.call) and last.kind != "call":
                joined[-1] = last._replace(text=last.text + delta.text)
            else:
                joined.append(delta)
        for delta in joined:
            if delta.kind == "content":
                yield {"content": delta.text}
            elif delta.kind == "reasoning":
                yield dict.fromkeys(THOUGHT, delta.text)
            elif call := self._write_call(delta):
                yield {"tool_calls": [call]}

    def _write_call(self, delta: Delta) -> dict[str, Any] | None:
        """A call that begins, or a piece of its arguments; None: it is not reported."""
        if delta.kind == "arguments":
            number = self._calls.get(delta.call)
            piece = {"arguments": delta.text}
            return None if number is None else {"index": number, "function": piece}
        name, number = function_name(delta.text), len(self._calls)
        if not name or not self._ask.calls or number >= self._ask.most_calls:
            return None
        self._calls[delta.call] = number
        return {
            "index": number,
            "id": f"functions.{name}:{self._ask.first_call + number}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }


def join_message(pieces: list[Piece]) -> dict[str, Any]:
    """A choice from its pieces, as a client joins them: `message`, `logprobs`, `finish_reason`."""
    texts: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    entries: list[Any] | None = None
    for piece in pieces:
        for name, value in piece["delta"].items():
            if name != "tool_calls":
                texts[name] = texts.get(name, "") + value
                continue
            for call in value:
                _join_call(calls, call)
        if "logprobs" in piece:
            entries = [*(entries or []), *piece["logprobs"]["content"]]
    message: dict[str, Any] = {"role": "assistant", "content": texts.get("content", "")}
    message |= {name: texts[name] for name in THOUGHT if name in texts}
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    logprobs = None if entries is None else {"content": entries, "refusal": None}
    return {"message": message, "logprobs": logprobs, "finish_reason": pieces[-1]["finish_reason"]}


def _join_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    function = piece["function"]
    if "id" in piece:
        head = {"id": piece["id"], "type": "function"}
        calls.append({**head, "function": dict(function)})
    else:
        calls[piece["index"]]["function"]["arguments"] += function["arguments"]
