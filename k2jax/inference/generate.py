"""Continue prompts with the tokens that a model finds likely."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from k2jax import cluster
from k2jax.config import ConfigError
from k2jax.inference.engine import Engine, fill_parts
from k2jax.inference.request import (
    FLOAT32_MAX,
    EngineSettings,
    EngineStats,
    Request,
    Result,
    Sampling,
    derive_seed,
)
from k2jax.model import Model
from k2jax.sharding import use_mesh_of

MOST_ROWS = 256  # sequences at once; more prompts wait for a row
BUCKET = 64  # tokens; lengths are rounded up to a multiple of it, or of more where they are long

Report = Callable[[EngineStats], None]
Prompts = Sequence[str] | Sequence[Sequence[int]]


def generate(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Iterable[int] | None = None,
) -> list[list[int]]:
    """The new token ids of each prompt, without the prompt and without the id that ended it.

    Fewer than `max_new_tokens` ids mean that the row ended itself. Calls of about the same
    lengths and the same number of prompts share one compiled program.

    Args:
        model: from `k2jax.load`.
        prompts: texts, or lists of token ids. A text is continued as the start of a document:
            [BOS], which begins every training document, goes before it. Ids are taken as they are.
        max_new_tokens: per prompt.
        temperature: 0 takes the most likely token, as does anything below 1e-30; else logits are
            divided by it.
        top_p: in (0, 1]; draw from the fewest tokens that together have this probability.
        seed: of the draws. A row's draws depend on its place in `prompts`, not on other rows: they
            are those of a `Request` with `derive_seed(seed, place)`.
        stop: ids that end a row; None: the tokenizer's `stops`, [EOS] and <|im_end|> with Kimi's;
            (): none.

    Raises:
        ConfigError: no or empty prompts, text without a tokenizer, an id or a setting out of
            range, or more tokens than the model's context.
        RuntimeError: the model's logits are not finite.
    """
    rows = check_prompts(model, prompts, max_new_tokens, temperature, top_p)
    sampling = Sampling(temperature, top_p, seed=seed)
    return take_ids(continue_all(model, make_requests(model, rows, max_new_tokens, sampling, stop)))


def make_requests(
    model: Model,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Iterable[int] | None = None,
) -> list[Request]:
    """Make the requests of `generate`: each row draws by a seed of its own."""
    ends = frozenset(stop_ids(model, stop))
    seeds = (derive_seed(sampling.seed, number) for number in range(len(rows)))
    return [
        Request(tuple(row), max_new_tokens, dataclasses.replace(sampling, seed=seed), ends)
        for row, seed in zip(rows, seeds, strict=True)
    ]


def take_ids(results: Sequence[Result]) -> list[list[int]]:
    """Return the new token ids of each result, without the one that ended it.

    Raises:
        RuntimeError: one of them ended by an error.
    """
    for number, result in enumerate(results):
        if result.error:
            raise RuntimeError(f"prompt {number}: {result.error}")
    return [list(r.ids[:-1] if r.finish_reason == "stop" else r.ids) for r in results]


def check_prompts(
    model: Model, prompts: Prompts, max_new_tokens: int, temperature: float, top_p: float
) -> list[list[int]]:
    """Token ids of every prompt, for which the rest can be computed; weights are not looked at.

    Raises:
        ConfigError: see `generate`.
    """
    rows = prompt_ids(model, prompts)
    check(model, rows, max_new_tokens, temperature, top_p)
    return rows


def prompt_ids(model: Model, prompts: Prompts) -> list[list[int]]:
    """Token ids of every prompt, [BOS] before texts.

    Raises:
        ConfigError: see `generate`.
    """
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text; give a list of texts: [text]")
    if not len(prompts):
        raise ConfigError("there are no prompts; give at least one, it may be an empty text")
    rows = [
        _ids(model, prompt, f"prompt {number}")  # type: ignore[arg-type]
        for number, prompt in enumerate(prompts)
    ]
    for number, row in enumerate(rows):
        if not row:
            raise ConfigError(f"prompt {number} has no token ids; give at least one, such as [BOS]")
        if wrong := [i for i in row if not 0 <= i < model.config.vocab]:
            raise ConfigError(
                f"prompt {number} has the id {wrong[0]}; ids are 0..{model.config.vocab - 1}"
            )
    return rows


def _ids(model: Model, prompt: str | Sequence[int], name: str) -> list[int]:
    if not isinstance(prompt, str):
        try:
            return [int(i) for i in prompt]
        except (TypeError, ValueError):
            raise ConfigError(f"{name} is {prompt!r}; give a text or a list of ids") from None
    if model.tokenizer is None:
        raise ConfigError(f"{name} is a text and this model has no tokenizer; give token ids")
    return [model.tokenizer.bos, *model.tokenizer.encode(prompt)]


def stop_ids(model: Model, stop: Iterable[int] | None) -> list[int]:
    """The ids that end a row.

    Raises:
        ConfigError: an id that the model does not have.
    """
    if stop is None:
        return list(model.tokenizer.stops) if model.tokenizer else []
    ends = [int(i) for i in stop]
    if wrong := [i for i in ends if not 0 <= i < model.config.vocab]:
        raise ConfigError(f"stop has the id {wrong[0]}; ids are 0..{model.config.vocab - 1}")
    return ends


def check(model: Model, rows: list[list[int]], new: int, temperature: float, top_p: float) -> None:
    """Refuse what cannot be computed.

    Raises:
        ConfigError: see `generate`.
    """
    if new < 1:
        raise ConfigError(f"max_new_tokens is {new}; it must be at least 1")
    if not 0 <= temperature <= FLOAT32_MAX:
        raise ConfigError(f"temperature is {temperature}; it must be 0 or more, and a float32")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature == 0 and top_p < 1:
        raise ConfigError(f"top_p {top_p} has no effect with temperature 0; set a temperature")
    context, longest = model.config.context, max(map(len, rows))
    if longest + new > context:
        number = [len(row) for row in rows].index(longest)
        fits = (
            f"at most {context - longest} new tokens fit"
            if longest < context
            else f"shorten the prompt to {max(context - new, 1)} tokens or fewer"
        )
        raise ConfigError(
            f"prompt {number} has {longest} tokens and {new} new ones are asked for, the model's"
            f" context is {context}: {fits}"
        )


def bucket(length: int) -> int:
    """`length` rounded up, so that few different ones are compiled and at most a quarter wasted."""
    unit = max(BUCKET, 1 << max(length.bit_length() - 3, 0))
    return -(-length // unit) * unit


def continue_all(
    model: Model, requests: Sequence[Request], report: Report | None = None
) -> list[Result]:
    """Compute requests of one call, in an engine that just holds them; results in their order.

    Sizes are rounded up, so that calls of about the same sizes share their compiled programs.

    Args:
        model: on its mesh.
        requests: what to compute.
        report: called with what the engine did, such as its steps and drafted tokens; in several
            processes by process 0 alone.

    Raises:
        ConfigError: one of them cannot be computed.
    """
    rows = fill_parts(model, min(1 << (len(requests) - 1).bit_length(), MOST_ROWS))
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    settings = EngineSettings(rows=rows, cache_tokens=rows * bucket(longest), prefill_share=1.0)
    with use_mesh_of(*model.params.values()):
        engine = Engine(model, settings)
        results = engine.run(requests)
        if report and cluster.current().number == 0:
            report(engine.stats())
        return results
