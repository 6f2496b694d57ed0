"""Fields that chats and completions share: sampling, ends, log-probabilities, streaming."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from k2jax.inference.request import SEEDS, TOP_LOGPROBS, Sampling
from k2jax.serve.body import Body
from k2jax.serve.refusal import Refusal

MOST_CHOICES = 64
MOST_STOPS = 16
MOST_BIAS = 100  # as the OpenAI API
KIMI_TOP_P = 0.95

SHARED = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "logprobs",
    "prompt_logprobs",
)
# Known elsewhere and not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logits_processors": ([],),
}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How tokens are drawn where a request does not say.

    Attributes:
        temperature: 1, unless the model's `generation_config.json` says otherwise; so are the rest.
        top_p: in (0, 1].
        top_k: 0: of all tokens.
        fixed: refuse other values than those that Kimi's API fixes: temperature 1 with thought and
            0.6 without, top_p 0.95, no penalties, one choice.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    fixed: bool = False

    def fix(self, thinks: bool) -> "Defaults":
        """The values that Kimi's API fixes, if they are fixed here."""
        if not self.fixed:
            return self
        return dataclasses.replace(self, temperature=1.0 if thinks else 0.6, top_p=KIMI_TOP_P)


def read_sampling(body: Body, defaults: Defaults, vocab: int) -> Sampling:
    """How tokens are drawn.

    Raises:
        Refusal: a field is wrong.
    """
    if defaults.fixed:
        _check_fixed(body, defaults)
    top_k = body.integer("top_k", defaults.top_k, -1, SEEDS)
    seed = body.integer("seed", random.getrandbits(32), -(2**63), 2**64 - 1)
    return Sampling(
        temperature=body.number("temperature", defaults.temperature, 0, 2),
        top_p=body.number("top_p", defaults.top_p, 0, 1, above=True),
        top_k=max(top_k, 0),
        min_p=body.number("min_p", 0, 0, 1),
        repetition_penalty=body.number("repetition_penalty", 1, 0.01, 10),
        presence_penalty=body.number("presence_penalty", 0, -2, 2),
        frequency_penalty=body.number("frequency_penalty", 0, -2, 2),
        seed=seed % SEEDS,
        logit_bias=_read_bias(body.mapping("logit_bias"), vocab),
    )


def _check_fixed(body: Body, defaults: Defaults) -> None:
    fixed = {
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "n": 1,
    }
    for name, value in fixed.items():
        if name in body and body.value(name) != value:
            body.refuse(name, f"is fixed at {value:g} by this server")


def _read_bias(bias: Mapping[str, Any], vocab: int) -> dict[int, float]:
    out = {}
    for key, value in bias.items():
        name = f"logit_bias[{key!r}]"
        if not key.isascii() or not key.isdigit() or int(key) >= vocab:
            raise Refusal(f"{name}: keys are token ids, 0..{vocab - 1}", "logit_bias")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -MOST_BIAS <= value <= MOST_BIAS:
            message = f"{name} must be a number, at least -{MOST_BIAS} and at most {MOST_BIAS}"
            raise Refusal(message, "logit_bias")
        out[int(key)] = float(value)
    return out


def read_length(body: Body, default: int, room: int, least: int, name: str) -> int:
    """How many new tokens there may be.

    Args:
        body: has `max_tokens` or, by its newer name, `max_completion_tokens`.
        default: where it has neither.
        room: tokens that the context has left behind the prompt.
        least: 0 or 1.
        name: of the field that holds the prompt.

    Raises:
        Refusal: the fields differ or are wrong, or the prompt and the new tokens do not fit.
    """
    names = [field for field in ("max_completion_tokens", "max_tokens") if field in body]
    values = {body.integer(field, 0, least, 2**31) for field in names}
    if len(values) > 1:
        body.refuse("max_tokens", "differs from max_completion_tokens")
    new = values.pop() if values else min(default, room)
    if room < max(new, least):
        if room > 0:
            message = (
                f"{new} new tokens do not fit in the context behind the prompt: at most {room}"
            )
        else:
            over = f", {-room} more than fit" if room < 0 else ""
            message = f"the prompt fills the context{over}; shorten it"
        param = names[0] if names and room > 0 else name
        raise Refusal(message, param, code="context_length_exceeded")
    return new


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends an answer besides its length."""

    ids: frozenset[int]
    texts: tuple[str, ...]


def read_ends(body: Body, stops: tuple[int, ...], vocab: int) -> Ends:
    """What ends an answer; `stops` are the tokenizer's.

    Raises:
        Refusal: a field is wrong.
    """
    ids = frozenset(body.ids("stop_token_ids", vocab))
    ids |= frozenset() if body.flag("ignore_eos") else frozenset(stops)
    return Ends(ids, body.texts("stop", MOST_STOPS))


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Whether and how an answer is streamed."""

    on: bool
    include_usage: bool
    every_usage: bool  # in each chunk, `continuous_usage_stats`


def read_streaming(body: Body) -> Streaming:
    """Whether and how the answer is streamed.

    Raises:
        Refusal: a field is wrong.
    """
    on, options = body.flag("stream"), body.mapping("stream_options")
    if options and not on:
        body.refuse("stream_options", "needs 'stream'")
    known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    inner = Body(options, known, {"include_obfuscation": (False,)})
    every = inner.flag("continuous_usage_stats")
    return Streaming(on, inner.flag("include_usage") or every, every)


def read_prompt_logprobs(body: Body, streaming: Streaming) -> int | None:
    """How many of the likeliest tokens are reported at each place of the prompt; None: nothing.

    Raises:
        Refusal: the field is wrong, or the answer is streamed.
    """
    if "prompt_logprobs" not in body:
        return None
    if streaming.on:
        body.refuse("prompt_logprobs", "is not streamed")
    return body.integer("prompt_logprobs", 0, 0, TOP_LOGPROBS)
