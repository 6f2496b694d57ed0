"""A completion: what the engine says of one choice becomes pieces of text; joined, the whole."""

from typing import Any

from k2jax.inference.request import Output
from k2jax.serve.ask import CompletionAsk
from k2jax.serve.choice import Choice, Piece
from k2jax.serve.token_text import CompletionLogprobs
from k2jax.text.interface import TokenizerLike


class CompletionChoice(Choice):
    """Reads one choice."""

    def __init__(self, tokenizer: TokenizerLike | None, ask: CompletionAsk, place: int):
        super().__init__()
        self._ask = ask
        self._prompt = ask.requests[place].prompt
        self._echo = ask.echoes[place] if ask.echoes is not None else None
        self._logprobs = None if ask.top is None else CompletionLogprobs(tokenizer, ask.top)
        self._begun = False

    def feed(self, output: Output) -> list[Piece]:
        """The pieces that an event adds; the last has a `finish_reason`."""
        pieces = []
        if self._echo is not None and not self._begun:
            self._begun = True
            pieces.append(self._write_echo(output))
        self.tokens += len(output.ids)
        if output.ids or output.text or output.finish_reason:
            piece: Piece = {"text": output.text}
            if self._logprobs is not None:
                piece["logprobs"] = self._logprobs.add(output.ids, output.logprobs)
            pieces.append(piece)
        if output.finish_reason is not None:
            self.finish_reason, self.error = output.finish_reason, output.error
            pieces[-1]["finish_reason"] = output.finish_reason
            stopped = output.stopped_by if output.finish_reason == "stop" else None
            pieces[-1]["stop_reason"] = stopped
        return pieces

    def _write_echo(self, output: Output) -> Piece:
        piece: Piece = {"text": self._echo}
        if self._logprobs is not None:
            entries = output.prompt_logprobs
            piece["logprobs"] = self._logprobs.add(self._prompt, entries, self._ask.begun)
        return piece


def join_text(pieces: list[Piece]) -> dict[str, Any]:
    """A choice from its pieces, as a client joins them."""
    logprobs: dict[str, list[Any]] | None = None
    for piece in pieces:
        if "logprobs" in piece:
            logprobs = logprobs or {name: [] for name in piece["logprobs"]}
            for name, values in piece["logprobs"].items():
                logprobs[name] += values
    return {
        "text": "".join(piece["text"] for piece in pieces),
        "logprobs": logprobs,
        "finish_reason": pieces[-1]["finish_reason"],
        "stop_reason": pieces[-1].get("stop_reason"),
    }
