"""How likely a model finds given tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from k2jax.config import ConfigError
from k2jax.inference.generate import continue_all
from k2jax.inference.request import Request, TokenLogprob
from k2jax.model import Model

Row = tuple[Sequence[int], Sequence[int]]


class Score(NamedTuple):
    """A continuation behind its context.

    Attributes:
        logprob: natural log-probability of all its tokens.
        is_greedy: whether each of them is the most likely one at its place.
        tokens: each of them, with the most likely one at its place.
    """

    logprob: float
    is_greedy: bool
    tokens: tuple[TokenLogprob, ...]


def score(model: Model, rows: Sequence[Row]) -> list[Score]:
    """Log-likelihoods of continuations, in the order of `rows`.

    Rows that begin alike share what is computed, so give those of one context together: of the
    choices of a question, the question is read once.

    Args:
        model: from `k2jax.load`; on the mesh of its weights.
        rows: token ids of a context, at least one such as [BOS], and of what follows it.

    Raises:
        ConfigError: an empty context, an id out of range, or more tokens than the model's context.
        RuntimeError: the model's logits are not finite.
    """
    requests = []
    for number, (context, continuation) in enumerate(rows):
        if not len(context):
            raise ConfigError(f"row {number} has no context; give at least one id, such as [BOS]")
        prompt = tuple(int(i) for i in (*context, *continuation))
        requests.append(Request(prompt, 0, prompt_logprobs=1, prompt_logprobs_from=len(context)))
    results = continue_all(model, requests) if requests else []
    scores = []
    for number, result in enumerate(results):
        if result.error:
            raise RuntimeError(f"row {number}: {result.error}")
        tokens = tuple(entry for entry in result.prompt_logprobs if entry)
        is_greedy = all(entry.id == entry.top[0][0] for entry in tokens)
        scores.append(Score(sum(entry.logprob for entry in tokens), is_greedy, tokens))
    return scores
