"""Answers requests with one engine, which all tasks of an evaluation share.

In several processes, process 0 asks and the others compute: they call `follow`.
"""

from collections.abc import Callable, Iterable

from k2jax.config import ConfigError
from k2jax.inference.engine import LONGEST, Engine, count_parts, fill_parts
from k2jax.inference.request import EngineSettings, Output, Request, Result, join_outputs
from k2jax.model import Model
from k2jax.text.interface import TokenizerLike

AHEAD = 4  # requests that wait, as a multiple of those that are computed


class Scorer:
    """A model with an engine.

    Attributes:
        tokenizer: of the model.
        context: most tokens of a sequence, whatever `rows` are.
        most: that the model takes.
    """

    def __init__(self, model: Model, rows: int = 8, context: int = 0, cache_tokens: int = 0):
        """Reserve the cache; programs are compiled when they are first used.

        Args:
            model: on the mesh on which to compute.
            rows: sequences at once; no result depends on it.
            context: most tokens of a sequence; 0: the model's context, at most 4,096.
            cache_tokens: in memory, all sequences together; 0: `rows` times the context, at most
                4,096 a row, and no less than one sequence may need.

        Raises:
            ConfigError: there is no tokenizer, or a size is out of range.
        """
        most = model.config.context
        if model.tokenizer is None:
            raise ConfigError("this model has no tokenizer, which tasks need")
        if rows < 1:
            raise ConfigError(f"rows is {rows}; it must be at least 1")
        if not 0 <= context <= most:
            raise ConfigError(f"max_length is {context}; the model takes 1..{most}")
        self.tokenizer: TokenizerLike = model.tokenizer
        self.most, self.context = most, context or min(most, LONGEST)
        rows, parts = fill_parts(model, rows), count_parts(model)
        room = max(rows // parts * min(self.context, LONGEST), self.context)
        cache_tokens = cache_tokens or room * parts
        settings = EngineSettings(
            rows=rows, cache_tokens=cache_tokens, prefill_share=1.0, queue=1 << 30
        )
        self._engine = Engine(model, settings)
        self._ahead, self._open = AHEAD * rows, 0
        self._ended: list[tuple[Callable[[Result], None], list[Output]]] = []
        if self._engine.context < self.context:
            raise ConfigError(
                f"the cache has room for sequences of {self._engine.context} tokens, fewer than"
                f" {self.context}; raise cache_tokens or lower max_length"
            )

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being computed."""
        return not self._open

    @property
    def has_room(self) -> bool:
        """Whether another request would be computed soon."""
        return self._open < self._ahead

    def submit(self, request: Request, then: Callable[[Result], None]) -> None:
        """Take a request; those that begin alike, one after the other, share what is computed.

        Args:
            request: what is asked for.
            then: called by `step` when it has ended; it may submit more.

        Raises:
            ConfigError: the request cannot be computed.
        """
        events: list[Output] = []

        def keep(output: Output) -> None:
            events.append(output)
            if output.finish_reason is not None:
                self._ended.append((then, events))

        self._engine.submit(request, keep)
        self._open += 1

    def step(self) -> None:
        """Compute one step, and hand over what has ended."""
        self._engine.step()
        ended, self._ended = self._ended, []
        self._open -= len(ended)
        for then, events in ended:
            then(join_outputs(events))

    def run(self, jobs: Iterable[tuple[Request, Callable[[Result], None]]]) -> None:
        """Compute requests to their end; each of `jobs` is read when there is room for it."""
        for request, then in jobs:
            self.submit(request, then)
            while not self.has_room:
                self.step()
        while not self.is_idle:
            self.step()

    def follow(self) -> None:
        """Compute what process 0 asks for, in any other one, until it calls `dismiss`."""
        self._engine.follow()

    def dismiss(self) -> None:
        """Let the other processes go on."""
        self._engine.dismiss()
