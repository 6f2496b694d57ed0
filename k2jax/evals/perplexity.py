"""How well a model predicts text: the held-out loss of training and of `k2jax evaluate`."""

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from k2jax.config import ConfigError, ModelConfig
from k2jax.data import Store, eval_batches
from k2jax.data.store import write
from k2jax.inference.sampler import batch_ways
from k2jax.model import Batch, Dispatch, Kimi, Model, Policy, hidden, losses
from k2jax.model.batch import own_parts, to_devices
from k2jax.params.arrays import Params, bind


def score(
    model: Model,
    source: Store | Iterable[str],
    rows: int = 8,
    context: int = 0,
    stride: int = 0,
) -> dict[str, float]:
    """Nats per token, bits per byte and perplexity of text, every token of it scored once.

    Keys: `nats_per_token`, `bits_per_byte` (UTF-8 bytes of the text), `perplexity` (per token),
    `tokens` (scored ones: each document's and its [EOS]), `bytes`, `seconds`.

    Args:
        model: computes in the dtype of its weights; on the mesh in use, if there is one.
        source: tokenised documents, or texts, which the model's tokenizer then cuts into tokens.
        rows: rows computed at once; rounded up to what divides over the mesh.
        context: tokens in a row; 0: the model's context.
        stride: distance of the windows of a document longer than a row. A token then sees at
            least `context - stride` tokens before it; 0: no overlap, least work.

    Raises:
        ConfigError: no text, texts without a tokenizer, or a size out of range.
    """
    context = context or model.config.context
    _check(model, rows, context, stride)
    with _stored(model, source) as store:
        began = time.perf_counter()
        nll, tokens = _total(model, store, rows, context, stride)
        seconds = time.perf_counter() - began
        size = store.bytes
    return {
        "nats_per_token": nll / tokens,
        "bits_per_byte": nll / math.log(2) / size,
        "perplexity": math.exp(min(nll / tokens, 700.0)),  # beyond, a double overflows
        "tokens": int(tokens),
        "bytes": size,
        "seconds": round(seconds, 3),
    }


def _check(model: Model, rows: int, context: int, stride: int) -> None:
    if rows < 1:
        raise ConfigError(f"rows is {rows}; it must be at least 1")
    if not 1 <= context <= model.config.context:
        raise ConfigError(f"context is {context}; the model takes 1..{model.config.context}")
    if not 0 <= stride <= context:
        raise ConfigError(f"stride is {stride}; it must be in 1..{context}, or 0 for no overlap")


@contextlib.contextmanager
def _stored(model: Model, source: Store | Iterable[str]) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="k2jax-") as folder:
        if not isinstance(source, Store):
            if model.tokenizer is None:
                raise ConfigError("this model has no tokenizer; give tokenised documents")
            source = write(Path(folder, "text"), source, model.tokenizer)
        if not source.bytes:
            raise ConfigError("there is no text to score")
        yield source


def _total(model: Model, store: Store, rows: int, context: int, stride: int) -> tuple[float, float]:
    """Negative log likelihood of all targets in nats, and how many they are."""
    rows += -rows % batch_ways()
    batches = eval_batches(store, rows, context, stride=stride, **own_parts())
    sums = [
        _program()(model.params, to_devices(batch), model.config, model.dtype) for batch in batches
    ]
    # Added in double precision: the sum over millions of tokens.
    return sum(float(nll) for nll, _ in sums), sum(float(count) for _, count in sums)


@functools.cache
def _program() -> Callable[..., Any]:
    return jax.jit(total_loss, static_argnums=(2, 3))


def total_loss(
    params: Params, batch: Batch, cfg: ModelConfig, dtype: str,
    dispatch: Dispatch = Dispatch(),  # noqa: B008, a constant
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Sum of the negative log likelihoods in nats, and how many targets counted.

    Args:
        params: weights.
        batch: each array is [rows, length].
        cfg: sizes.
        dtype: to compute in.
        dispatch: how tokens meet their experts. No choice is ever dropped: a score is of the
            model, not of how full its experts' buffers were.
    """
    if dispatch.kind == "alltoall_capacity":
        dispatch = dispatch._replace(kind="alltoall")
    w, policy = bind(Kimi(cfg), params), Policy(dtype, dispatch=dispatch)
    x_BTD, _ = hidden(w, batch, cfg, policy)
    nll_BT = losses(w.head, x_BTD, batch.target, policy)
    return (nll_BT * batch.weight).sum(), batch.weight.sum()
