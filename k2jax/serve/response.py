"""An answer as the OpenAI API writes it: events of a stream, or one object of the same pieces."""

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

from k2jax.inference.request import Output
from k2jax.serve.ask import Ask, ChatAsk, CompletionAsk
from k2jax.serve.chat_answer import ChatChoice, join_message
from k2jax.serve.choice import Choice
from k2jax.serve.completion_answer import CompletionChoice, join_text
from k2jax.serve.refusal import Refusal, internal_error, too_busy
from k2jax.serve.running import Running
from k2jax.serve.service import ModelCard
from k2jax.serve.token_text import prompt_entries

Json = dict[str, Any]
Pieces = list[tuple[int, Json]]  # number of the choice, piece
DONE = "data: [DONE]\n\n"
KEEPALIVE = ": waiting\n\n"  # a comment, which clients pass over
write_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

AnyAsk = TypeVar("AnyAsk", bound=Ask)


@dataclasses.dataclass
class Answer(Generic[AnyAsk]):
    """One answer, with all its choices.

    Attributes:
        ask: what it answers.
        card: the model that does.
        choices: one for each sequence.
        prefix: of its id.
        names: `object` of a chunk and of the whole.
        join: makes a whole choice of its pieces.
    """

    ask: AnyAsk
    card: ModelCard
    choices: Sequence[Choice]
    prefix: str
    names: tuple[str, str]
    join: Callable[[list[Json]], Json]

    def __post_init__(self) -> None:
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self.card.names[0],
            "system_fingerprint": self.card.fingerprint or None,
        }
        # All chunks of a stream begin alike.
        opening = write_json({**self._head, "object": self.names[0]})
        self._opening = f'data: {opening[:-1]},"choices":'
        self._scores: dict[int, Any] = {}
        self._cached = 0

    async def read(self, running: Running, seconds: float) -> AsyncIterator[Pieces | None]:
        """Pieces as they come; None when nothing came for so many seconds.

        Raises:
            Refusal: the engine failed.
        """
        while any(choice.finish_reason is None for choice in self.choices):
            pieces: Pieces = []
            events = await running.next_events(seconds)
            for place, output in events:
                pieces += [(place, piece) for piece in self._feed(place, output, running)]
            if running.gone:
                return
            if pieces or not events:
                yield pieces or None

    def _feed(self, place: int, output: Output, running: Running) -> list[Json]:
        choice = self.choices[place]
        self._cached = max(self._cached, output.cached_tokens)
        if self.ask.scored and output.prompt_logprobs:
            self._scores[place] = output.prompt_logprobs
        pieces = choice.feed(output)
        if choice.finish_reason == "error":
            raise internal_error(choice.error or "the engine failed to answer this request")
        if choice.finish_reason == "abort" and not running.gone:
            raise too_busy("the server ends", 503)
        if choice.finish_reason is not None and output.finish_reason is None:
            running.stop(place)
        return pieces

    async def collect(self, running: Running, seconds: float) -> Json:
        """The whole answer; without the rest where the client left."""
        pieces: list[list[Json]] = [[] for _ in self.choices]
        async for batch in self.read(running, seconds):
            for place, piece in batch or ():
                pieces[place].append(piece)
        if running.gone:
            return {}
        whole = [
            {"index": place, **self.join(of_one), **self._score(place)}
            for place, of_one in enumerate(pieces)
        ]
        return {**self._head, "object": self.names[1], "choices": whole, "usage": self.usage()}

    def _score(self, place: int) -> Json:
        if not self.ask.scored:
            return {}
        count = self.ask.requests[place].prompt_logprobs or 0
        entries = self._scores.get(place, ())
        return {"prompt_logprobs": prompt_entries(self.card.tokenizer, entries, count)}

    async def stream(self, running: Running, seconds: float) -> AsyncIterator[str]:
        """Events of the stream, those that come together in one text; the last is `[DONE]`."""
        try:
            for place in range(len(self.choices)):
                if opening := self.open_choice(place):
                    yield self._event([opening])
            async for batch in self.read(running, seconds):
                if batch is None:
                    yield KEEPALIVE
                else:
                    yield "".join(self._event([self.write_choice(*one)]) for one in batch)
            if self.ask.streaming.include_usage:
                yield self._event([], self.usage())
        except Refusal as refusal:
            yield f"data: {write_json(refusal.body())}\n\n"
        yield DONE

    def _event(self, choices: list[Json], usage: Json | None = None) -> str:
        end = ""
        if self.ask.streaming.include_usage:
            end = (
                f',"usage":{write_json(self.usage() if self.ask.streaming.every_usage else usage)}'
            )
        return f"{self._opening}{write_json(choices)}{end}}}\n\n"

    def open_choice(self, place: int) -> Json | None:
        """What a choice begins with in a stream; None: nothing."""
        return None

    def write_choice(self, place: int, piece: Json) -> Json:
        """A choice of a chunk."""
        return {"index": place, "logprobs": None, "finish_reason": None, **piece}

    def usage(self) -> Json:
        """Tokens of the prompts and of all choices."""
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.ask.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.ask.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


class ChatAnswer(Answer[ChatAsk]):
    """The answer to a conversation."""

    def open_choice(self, place: int) -> Json:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return self.write_choice(place, {"delta": delta})

    def write_choice(self, place: int, piece: Json) -> Json:
        """A choice of a chunk; its last one has the usage, where Kimi's API has it."""
        written = super().write_choice(place, piece)
        if piece.get("finish_reason"):
            prompt, new = len(self.ask.requests[place].prompt), self.choices[place].tokens
            written["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": new,
                "total_tokens": prompt + new,
                "cached_tokens": self._cached,
            }
        return written


def answer_chat(ask: ChatAsk, card: ModelCard) -> ChatAnswer:
    """Begin the answer to a conversation."""
    tokenizer = card.need_tokenizer()
    choices = [ChatChoice(tokenizer, ask, request.prompt) for request in ask.requests]
    names = "chat.completion.chunk", "chat.completion"
    return ChatAnswer(ask, card, choices, "chatcmpl-", names, join_message)


def answer_completion(ask: CompletionAsk, card: ModelCard) -> Answer[CompletionAsk]:
    """Begin to continue prompts."""
    choices = [CompletionChoice(card.tokenizer, ask, i) for i in range(len(ask.requests))]
    names = "text_completion", "text_completion"
    return Answer(ask, card, choices, "cmpl-", names, join_text)
