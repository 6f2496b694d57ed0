"""Continue prompts with the tokens that a model finds likely."""

from collections.abc import Iterable, Sequence

import numpy as np

from k2jax.config import ConfigError
from k2jax.inference import extend as sample
from k2jax.model import Model
from k2jax.ops.moe.dispatch import choose_dispatch
from k2jax.sharding import use_mesh_of

# Below it logits over the temperature may overflow float32; even near ties are decided far above.
COLD = 1e-30
BUCKET = 64  # tokens; lengths are rounded up to a multiple of it, or of more where they are long

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
        seed: of the draws. A row's draws depend on its place in `prompts`, not on other rows.
        stop: ids that end a row; None: the tokenizer's `stops`, [EOS] and <|im_end|> with Kimi's;
            (): none.

    Raises:
        ConfigError: no or empty prompts, text without a tokenizer, an id or a setting out of
            range, or more tokens than the model's context.
    """
    rows = check_prompts(model, prompts, max_new_tokens, temperature, top_p)
    ends = stop_ids(model, stop)
    with use_mesh_of(*model.params.values()):
        return _run(model, rows, ends, (max_new_tokens, temperature, top_p, seed))


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
    if not 0 <= temperature <= float(np.finfo(np.float32).max):
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


def _run(
    model: Model,
    rows: list[list[int]],
    ends: list[int],
    settings: tuple[int, float, float, int],
) -> list[list[int]]:
    new, temperature, top_p, seed = settings
    kind = sample.GREEDY if temperature < COLD else sample.PLAIN if top_p == 1 else sample.NUCLEUS
    with sample.decoding(model.params, model.config) as params:
        padded = [*rows, *[[0]] * (-len(rows) % sample.batch_ways())]
        token_BT = np.zeros((len(padded), bucket(max(map(len, padded)))), np.int32)
        for row, ids in zip(token_BT, padded, strict=True):
            row[: len(ids)] = ids
        request = sample.Request(
            token_BT,
            np.array([len(ids) for ids in padded], np.int32),
            limit=new,
            stop=np.array(ends or [sample.STOPPED], np.int32),
            allowed=model.tokenizer.vocab if model.tokenizer else model.config.vocab,
            temperature=temperature or 1.0,
            top_p=top_p,
            seed=np.uint32(seed % (1 << 32)),
        )
        found = sample.extend(
            params,
            request,
            cfg=model.config,
            dtype=model.dtype,
            room=bucket(new),
            kind=kind,
            dispatch=choose_dispatch(),
        )
        found_BN = np.asarray(found)[: len(rows), :new]
    return [ids[ids != sample.STOPPED].tolist() for ids in found_BN]
