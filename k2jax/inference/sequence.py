"""A request in the engine: its tokens, what of them is computed, and where it lies."""

import dataclasses
from collections.abc import Callable

from k2jax.inference.pages import ROOT
from k2jax.inference.request import Output, Request, TokenLogprob
from k2jax.inference.stops import TextCutter

OnOutput = Callable[[Output], None]


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One request from its submission to its last event.

    Attributes:
        number: of the request, in the order of submission.
        request: what is asked for.
        on_output: called with every event; None: only the last one is kept, in `result`.
        cutter: makes text of ids and cuts it at stop texts; None: no text is wanted.
        tokens: the prompt, then the new ones.
        target: tokens that prompts' chunks compute; later ones are computed one a step.
        row: of the executor; -1: the sequence waits.
        part: of the pool that its pages lie in.
        pages: one for each `page` tokens, in order.
        sent: pages that the executor's table has.
        entry: in `Pages`, of the last full block; see there.
        done: tokens whose latents are computed.
        unread: 1 where nothing follows the prompt and its last token's logits are not wanted.
        scored: the next place in the prompt whose log-probability is to be reported.
        cached: of the prompt, tokens that came from the prefix cache.
        logprobs, prompt_logprobs: those that no event has had yet.
        reported: new tokens that events have had.
        text: of new tokens, that no event has had.
        counted: the statistics have its prompt.
        result: the last event.
    """

    number: int
    request: Request
    on_output: OnOutput | None = None
    cutter: TextCutter | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    target: int = 0
    row: int = -1
    part: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    sent: int = 0
    entry: int = ROOT
    done: int = 0
    unread: int = 0
    scored: int = 0
    cached: int = 0
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = dataclasses.field(default_factory=list)
    reported: int = 0
    text: str = ""
    counted: bool = False
    result: Output | None = None

    def __post_init__(self) -> None:
        self.tokens = [int(i) for i in self.request.prompt]
        self.target = len(self.tokens)
        self.scored = self.target
        if self.request.prompt_logprobs is not None:
            self.scored = max(self.request.prompt_logprobs_from, 1)
            self.prompt_logprobs = [None] * (self.request.prompt_logprobs_from == 0)
            if self.request.max_new_tokens == 0 and self.scored < self.target:
                self.unread = 1
                self.target -= 1

    @property
    def new_count(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def can_draft(self) -> bool:
        """Whether the token after the next one may be guessed.

        Nothing may depend on the next one but the logits, and there must be room for both.
        """
        request = self.request
        depends = request.constraint is not None or request.sampling.counts
        return not depends and self.new_count + 2 <= request.max_new_tokens

    @property
    def end(self) -> int:
        """Tokens that are known and read."""
        return len(self.tokens) - self.unread

    @property
    def shareable(self) -> int:
        """Tokens from the start whose logits nobody asks for: a cache may have them."""
        return min(self.scored, len(self.request.prompt)) - 1

    def read_text(self, token: int) -> str | None:
        """Make text of a new token; the stop text that it completed, if it did.

        Where nobody listens and nothing can stop it, text is made at the end.
        """
        if self.cutter is None or (self.on_output is None and not self.request.stop):
            return None
        text, stop = self.cutter.feed((token,))
        self.text += text
        return stop

    def take_output(
        self, reason: str | None, stopped_by: int | str | None = None, error: str = ""
    ) -> Output:
        """Return what no event has had yet."""
        prompt = len(self.request.prompt)
        new = self.tokens[prompt + self.reported :]
        if reason and self.cutter and not isinstance(stopped_by, str):
            if self.on_output is None and not self.request.stop:
                ended = isinstance(stopped_by, int)
                self.text += self.cutter.feed(new[:-1] if ended else new)[0]
            self.text += self.cutter.close()
        output = Output(
            tuple(new),
            self.text,
            tuple(self.logprobs),
            tuple(self.prompt_logprobs),
            reason,
            stopped_by,
            error,
            self.cached,
            prompt,
        )
        self.reported += len(new)
        self.text, self.logprobs, self.prompt_logprobs = "", [], []
        return output
