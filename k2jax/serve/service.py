"""What a server knows of its model, and how it treats requests."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

from k2jax.inference.request import EngineStats, Output, Request
from k2jax.serve.prometheus import Meters
from k2jax.serve.refusal import Refusal
from k2jax.serve.sampling_fields import Defaults
from k2jax.text.interface import TokenizerLike

MEGABYTE = 2**20


class EngineLike(Protocol):
    """What a server needs of `k2jax.inference.engine.Engine`.

    Attributes:
        error: one line, when it can compute no more.
    """

    error: str

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> int:
        """Queue a request; `on_output` is called for each event from the engine's thread."""

    def abort(self, number: int) -> None:
        """End a request; a last event says so."""

    def stats(self) -> EngineStats:
        """Counters and gauges."""


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is served.

    Attributes:
        names: that requests may call it; the first is its `id`.
        tokenizer: of the model; None: prompts are token ids, and there are no chats.
        vocab: ids are below it.
        context: most tokens of a prompt and its continuation.
        fingerprint: changes with the weights.
    """

    names: tuple[str, ...]
    tokenizer: TokenizerLike | None
    vocab: int
    context: int
    fingerprint: str = ""

    def need_tokenizer(self) -> TokenizerLike:
        """The tokenizer.

        Raises:
            Refusal: there is none.
        """
        if self.tokenizer is None:
            raise Refusal("this model has no tokenizer; give prompts as token ids", "prompt")
        return self.tokenizer

    def check_name(self, name: Any) -> None:
        """See that a request means this model; one that names none does.

        Raises:
            Refusal: it names another.
        """
        if name is None or name in self.names:
            return
        if not isinstance(name, str):
            raise Refusal("model must be a text", "model", code="invalid_value")
        message = f"there is no model {name!r}; this server has {self.names[0]!r}"
        raise Refusal(message, "model", status=404, code="model_not_found")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is taken from clients.

    Attributes:
        body: bytes of a request.
        body_seconds: in which a request's body must have come.
        stalled_seconds: after which a client that takes nothing of its answer is given up.
        keepalive_seconds: between comments in a stream that has nothing to say.
        sequences: of one request, prompts times choices.
    """

    body: int = 16 * MEGABYTE
    body_seconds: float = 60.0
    stalled_seconds: float = 60.0
    keepalive_seconds: float = 15.0
    sequences: int = 1024


@dataclasses.dataclass
class Service:
    """A model behind an engine, and the rules of the house.

    Attributes:
        engine: runs the model.
        card: what is served.
        defaults: of sampling.
        limits: of requests.
        keys: any of them opens the server; none: it is open.
        hosts: names in the Host header that are answered; none: all.
        log: takes lines on requests; nothing of their text is in them unless `log_texts`.
        log_texts: log prompts and answers.
        meters: what is counted.
        draining: no new requests are taken.
        started: seconds since 1970.
    """

    engine: EngineLike
    card: ModelCard
    defaults: Defaults = dataclasses.field(default_factory=Defaults)
    limits: Limits = dataclasses.field(default_factory=Limits)
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    log: Callable[[str], None] | None = None
    log_texts: bool = False
    meters: Meters = dataclasses.field(default_factory=Meters)
    draining: bool = False
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def write_log(self, line: str) -> None:
        """Log a line, if there is a log."""
        if self.log is not None:
            self.log(line)
