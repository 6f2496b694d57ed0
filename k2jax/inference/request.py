"""What the engine is asked for, and what it answers: plain data, imported without jax.

A request's tokens depend on the request alone: not on its place, its neighbours, when it came, or
what the prefix cache holds.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from k2jax.config import ConfigError

TOP_LOGPROBS = 20  # most alternatives whose log-probability is reported
COLD = 1e-30  # below it logits over the temperature may overflow float32; taken as 0
SEEDS = 1 << 32
MOST_BIAS = 10_000
FLOAT32_MAX = float(np.finfo(np.float32).max)


class QueueFull(RuntimeError):
    """As many requests wait as the engine takes; the same one may be accepted later."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    In this order: penalties, bias, constraint, temperature, then `top_k`, `top_p` and `min_p`, each
    of which keeps tokens as likely as the last one kept.

    Attributes:
        temperature: 0 takes the most likely token, as does anything below 1e-30; else logits are
            divided by it.
        top_p: in (0, 1]; draw from the fewest tokens that together have this probability.
        top_k: draw from the that many likeliest; 0: from all.
        min_p: in [0, 1]; drop tokens less likely than this share of the likeliest one.
        repetition_penalty: above 0; divides positive logits of tokens in the prompt or among the
            new ones, multiplies negative ones [CTRL, sec. 4.1].
        presence_penalty: subtracted from the logit of each token among the new ones.
        frequency_penalty: the same, times how often it was chosen.
        seed: of the draws; the number of the new token is the other half of the key.
        logit_bias: added to logits, by token id.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < COLD

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed token by token."""
        return self.counts or bool(self.logit_bias)

    @property
    def counts(self) -> bool:
        """Whether tokens that were seen change the next choice."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties)


class Constraint(Protocol):
    """Which tokens may come next; one object a sequence, called by the engine's thread alone.

    An exception from any of these ends the sequence, and no other, with the reason "error".
    """

    def start(self, max_new_tokens: int) -> None:
        """Begin; called once, when the request is submitted.

        Args:
            max_new_tokens: that the sequence may have.

        Raises:
            ConfigError: it cannot close within so many.
        """

    def mask(self) -> np.ndarray | None:
        """Return the allowed tokens, uint32 [ceil(vocab / 32)]; None: any token.

        Token i is bit i % 32 of word i // 32.
        """

    def accept(self, token: int) -> None:
        """Move on by the token that was chosen, the one that ends the sequence included."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue or to score.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: 0 only where `prompt_logprobs` are asked for.
        sampling: how tokens are chosen.
        stop_ids: ids that end the sequence.
        stop: texts that end it, also across token borders; the text ends before them.
        logprobs: n: log-probabilities of each new token and of the n likeliest, by the model alone:
            before penalties, bias, constraint and temperature. None: none.
        prompt_logprobs: the same of the prompt's tokens; the first has none.
        prompt_logprobs_from: the first place in the prompt that `prompt_logprobs` cover; 0: all
            of it, its first token with None. What lies before may come from the prefix cache.
        constraint: which tokens may come next. One object serves one request.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0
    constraint: Constraint | None = None


class TokenLogprob(NamedTuple):
    """A token, its natural log-probability, and the likeliest tokens at its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """One event of a request: what is new since the last one. The last has a `finish_reason`.

    Attributes:
        ids: new tokens; the last one may be a stop id.
        text: of new tokens, but for a stop id; "" without a tokenizer. Incomplete characters and
            what may become a stop text are held back.
        logprobs: one for each of `ids`, if asked for.
        prompt_logprobs: of the prompt from `prompt_logprobs_from` on, with the first event; None
            for the prompt's first token, which follows nothing.
        finish_reason: None, or "stop", "length", "abort" or "error".
        stopped_by: the id or the text of a "stop"; None where a constraint had nothing to add.
        error: one line, with the reason "error".
        cached_tokens: of the prompt, that came from the prefix cache.
        prompt_tokens: of the prompt.
        experts: with the last event, where the engine keeps them: of each token that was read, all
            but the last new one, int16 [tokens, layers with experts, experts a token]. Only
            process 0 has them.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: str | None = None
    stopped_by: int | str | None = None
    error: str = ""
    cached_tokens: int = 0
    prompt_tokens: int = 0
    experts: np.ndarray | None = dataclasses.field(default=None, compare=False)


# All events of a request, joined: the attributes mean the same.
Result = Output


def join_outputs(outputs: list[Output]) -> Result:
    """Return what all events of a request say together."""
    return dataclasses.replace(
        outputs[-1],
        ids=tuple(i for output in outputs for i in output.ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
    )


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an engine may use.

    Attributes:
        rows: sequences that get new tokens at once; others wait.
        cache_tokens: tokens whose latents fit in memory, all sequences together; 0: `rows` times
            the model's context, at most 4,096 a row.
        queue: requests that wait at most; `submit` then raises QueueFull.
        prefill_share: share of the time that prompts may take while others get new tokens: with
            0.5 a long prompt makes their tokens take twice the time. 1: prompts first.
        prefix_cache: keep the latents of prompts for requests that begin alike.
        deterministic: a request's tokens depend on the request alone; False: faster for many rows
            at once, and log-probabilities may differ in last bits with what else is computed.
        drafts: where the model has MTP layers, the first guesses the token after each next one,
            and one step checks both: the same tokens in fewer steps.
        experts: results have the experts that their tokens chose.
    """

    rows: int = 16
    cache_tokens: int = 0
    queue: int = 1024
    prefill_share: float = 0.5
    prefix_cache: bool = True
    deterministic: bool = True
    drafts: bool = True
    experts: bool = False


@dataclasses.dataclass
class EngineStats:
    """Gauges of now, then counters since the start.

    Attributes:
        running: sequences that have a row.
        waiting: requests in the queue.
        rows: most sequences that run.
        pages_total: of the cache, scratch aside.
        pages_used: that running sequences hold.
        pages_cached: that only the prefix cache holds.
        prompt_tokens_total: of requests that have begun.
        cached_tokens_total: of those, from the prefix cache.
        new_tokens_total: chosen.
        drafted_tokens_total: guessed by an MTP layer, and checked.
        accepted_tokens_total: of those, the ones that were chosen: each saved a step.
        steps_total: of the engine.
        preemptions_total: sequences that gave their pages up and were computed again.
        finished_stop_total: requests that ended by a stop id, a stop text or their constraint.
        finished_length_total: by `max_new_tokens`.
        finished_abort_total: by `abort`.
        finished_error_total: by an error of their own.
    """

    running: int = 0
    waiting: int = 0
    rows: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    new_tokens_total: int = 0
    drafted_tokens_total: int = 0
    accepted_tokens_total: int = 0
    steps_total: int = 0
    preemptions_total: int = 0
    finished_stop_total: int = 0
    finished_length_total: int = 0
    finished_abort_total: int = 0
    finished_error_total: int = 0


def check_request(request: Request, vocab: int, context: int, has_text: bool) -> None:
    """Refuse what cannot be computed.

    Args:
        request: to check.
        vocab: ids are below it.
        context: most tokens of a sequence.
        has_text: there is a tokenizer.

    Raises:
        ConfigError: names the first mistake.
    """
    prompt, new = request.prompt, request.max_new_tokens
    if not prompt:
        raise ConfigError("the prompt has no token ids; give at least one, such as [BOS]")
    if min(prompt) < 0 or max(prompt) >= vocab:
        wrong = next(i for i in prompt if not 0 <= i < vocab)
        raise ConfigError(f"the prompt has the id {wrong}; ids are 0..{vocab - 1}")
    if new < (1 if request.prompt_logprobs is None else 0):
        raise ConfigError(f"max_new_tokens is {new}; it must be at least 1")
    # The last token of a prompt to score follows all that is read.
    if len(prompt) + new > context + (new == 0):
        left = context - len(prompt)
        fits = f"at most {left} new tokens fit" if left > 0 else "shorten the prompt"
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and {new} new ones are asked for, the context is"
            f" {context}: {fits}"
        )
    if not 0 <= request.prompt_logprobs_from <= len(prompt):
        raise ConfigError(
            f"prompt_logprobs_from is {request.prompt_logprobs_from}; it must be in"
            f" 0..{len(prompt)}"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if not 0 <= (getattr(request, name) or 0) <= TOP_LOGPROBS:
            raise ConfigError(f"{name} is {getattr(request, name)}; it must be 0..{TOP_LOGPROBS}")
    _check_stops(request, vocab, has_text)
    check_sampling(request.sampling, vocab)


def _check_stops(request: Request, vocab: int, has_text: bool) -> None:
    if wrong := [i for i in request.stop_ids if not 0 <= i < vocab]:
        raise ConfigError(f"stop has the id {wrong[0]}; ids are 0..{vocab - 1}")
    if request.stop and not has_text:
        raise ConfigError("stop has texts and this model has no tokenizer; give stop_ids")
    if "" in request.stop:
        raise ConfigError("stop has an empty text, which would end every sequence at once")


RANGES = {
    "min_p": (0, 1),
    "top_k": (0, SEEDS),
    "repetition_penalty": (0.001, 1000),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Refuse settings out of range.

    Raises:
        ConfigError: names the first.
    """
    if not 0 <= sampling.temperature <= FLOAT32_MAX:
        raise ConfigError(
            f"temperature is {sampling.temperature}; it must be 0 or more, and a float32"
        )
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p is {sampling.top_p}; it must be above 0 and at most 1")
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(sampling, name)) <= most:
            raise ConfigError(f"{name} is {value}; it must be in {least}..{most}")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocab:
            raise ConfigError(f"logit_bias has the id {token}; ids are 0..{vocab - 1}")
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise ConfigError(
                f"logit_bias of {token} is {bias}; it must be in -{MOST_BIAS}..{MOST_BIAS}"
            )


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of the `number`-th of n continuations of one prompt; the first keeps `seed`.

    Ours: a step of the golden ratio's bits, so that neighbouring seeds do not share draws.
    """
    return (seed + number * 0x9E3779B9) % SEEDS
