"""What a ledger has of one request, and the seed of its draws."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.inference.request import Result, TokenLogprob


class Unanswered(ConfigError):
    """The model has no answer: its logits are no numbers, or the prompt leaves no room."""


def hash_ids(ids: Sequence[int]) -> str:
    """Return what tells a prompt from others: 16 hex digits of SHA-256 over its ids."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:16]


def derive_from(seed: int, *names: object) -> int:
    """Return the seed of a request, whatever is asked beside it."""
    text = "\n".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def describe_continuation(prompt: Sequence[int], result: Result) -> dict[str, Any]:
    """Return what is kept of generated text.

    Raises:
        Unanswered: the request ended by an error.
    """
    _check(result)
    return {
        "prompt": hash_ids(prompt),
        "ids": list(result.ids),
        "logprobs": _shorten(result.logprobs),
        "text": result.text,
        "end": result.finish_reason,
    }


def describe_scored(context: Sequence[int], result: Result) -> dict[str, Any]:
    """Return what is kept of a continuation that was scored.

    Raises:
        Unanswered: the request ended by an error.
    """
    _check(result)
    tokens = [entry for entry in result.prompt_logprobs if entry]
    return {
        "prompt": hash_ids(context),
        "ids": [entry.id for entry in tokens],
        "logprobs": _shorten(tokens),
        "is_greedy": all(entry.id == entry.top[0][0] for entry in tokens),
    }


def _check(result: Result) -> None:
    if result.error:
        raise Unanswered(result.error)


def _shorten(entries: Sequence[TokenLogprob]) -> list[float]:
    """Write float32 by the fewest digits that give it back; nothing is rounded."""
    return [float(str(np.float32(entry.logprob))) for entry in entries]
