"""What a request asks of the engine and how its answer is written: plain data."""

import dataclasses

from k2jax.inference.request import Request
from k2jax.serve.sampling_fields import Streaming


@dataclasses.dataclass(frozen=True)
class Ask:
    """One HTTP request, read.

    Attributes:
        requests: of the engine, one for each choice.
        streaming: whether and how the answer is streamed.
        top: likeliest tokens whose log-probabilities are reported; None: no log-probabilities.
        scored: the prompt's log-probabilities are reported as `prompt_logprobs`.
        prompt_tokens: of all prompts, each counted once.
    """

    requests: tuple[Request, ...]
    streaming: Streaming
    top: int | None
    scored: bool
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class ChatAsk(Ask):
    """A conversation to answer.

    Attributes:
        stop: texts that end the content.
        calls: whether calls of tools are reported; without tools the model should write none.
        first_call: index of the next call in the conversation.
        most_calls: calls reported at most; 1 where they may not be parallel.
    """

    stop: tuple[str, ...] = ()
    calls: bool = False
    first_call: int = 0
    most_calls: int = 1024


@dataclasses.dataclass(frozen=True)
class CompletionAsk(Ask):
    """Prompts to continue.

    Attributes:
        echoes: by choice, the prompt's text, which goes before what continues it; None: no echo.
        begun: tokens at the start of each prompt that its text does not have ([BOS]).
    """

    echoes: tuple[str, ...] | None = None
    begun: int = 0
