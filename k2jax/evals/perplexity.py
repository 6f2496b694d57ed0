"""How well a model predicts text: the held-out loss of training and of `k2jax evaluate`."""

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from k2jax import cluster, sharding
from k2jax.config import ConfigError, ModelConfig
from k2jax.data import Store, eval_batches
from k2jax.data.store import write
from k2jax.model import Batch, Dispatch, Kimi, Model, Policy, hidden, losses
from k2jax.model.batch import own_parts, to_devices
from k2jax.ops.moe.dispatch import choose_dispatch
from k2jax.params.arrays import Params, bind


class HeldOut(NamedTuple):
    """Sums over scored tokens, of all processes together; means over no tokens are 0."""

    nll: float  # nats
    tokens: float
    bytes: int  # of text that the tokens stand for

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood."""
        return self.nll / max(self.tokens, 1.0)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, and with compressors."""
        return self.nll / math.log(2) / max(self.bytes, 1)


Evaluate = Callable[[Batch], tuple[jax.Array, jax.Array]]  # `total_loss` of some weights


def heldout_loss(
    evaluate: Evaluate,
    store: Store,
    rows: int,
    context: int,
    byte_lengths: np.ndarray,
    *,
    stride: int = 0,
    limit: int = 0,
) -> HeldOut:
    """Score documents on the mesh in use, every token once, over any number of processes.

    Each process makes the rows of its own devices. A row that several have is counted by one.

    Args:
        evaluate: from a batch, nats of all its targets and how many they are.
        store: tokenised documents, the same in every process.
        rows: rows of a batch, all processes together; the mesh must divide them.
        context: tokens of a row.
        byte_lengths: bytes of text of each token id.
        stride: distance of the windows of a document longer than a row; 0: no overlap.
        limit: at most that many rows, spread evenly over all of them; 0: all.
    """
    share = sharding.batch_share()
    counted = np.repeat(share.first, rows // share.of)
    nll = tokens = 0.0  # added in double precision: sums over millions of tokens
    size = 0
    for batch in eval_batches(store, rows, context, stride=stride, limit=limit, **own_parts()):
        part, count = evaluate(to_devices(batch))
        scored = byte_lengths[batch["targets"]] * (batch["weights"] > 0)
        size += int(scored[counted].sum())
        nll, tokens = nll + float(part), tokens + float(count)
    return HeldOut(nll, tokens, _sum_over_processes(size))


def _sum_over_processes(value: int) -> int:
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    # Two halves: without x64, JAX has no 64-bit integers.
    halves = np.array([value >> 24, value & (1 << 24) - 1], np.int32)
    high, low = np.asarray(multihost_utils.process_allgather(halves)).reshape(-1, 2).T
    return (int(high.sum(dtype=np.int64)) << 24) + int(low.sum(dtype=np.int64))


def score(
    model: Model,
    source: Store | Iterable[str],
    rows: int = 8,
    context: int = 0,
    stride: int = 0,
    dispatch: str = "",
) -> dict[str, float]:
    """Nats per token, bits per byte and perplexity of text, every token of it scored once.

    Keys: `nats_per_token`, `bits_per_byte` (UTF-8 bytes of the text), `perplexity` (per token),
    `tokens` (scored ones: each document's and its [EOS]), `bytes`, `seconds`.

    Args:
        model: computes in the dtype of its weights; on the mesh in use, if there is one.
        source: tokenised documents, or texts, which the model's tokenizer then cuts into tokens.
            In several processes the same in each.
        rows: rows computed at once; rounded up to what divides over the mesh.
        context: tokens in a row; 0: the model's context.
        stride: distance of the windows of a document longer than a row. A token then sees at
            least `context - stride` tokens before it; 0: no overlap, least work.
        dispatch: how tokens reach their experts; "": what needs least memory on the mesh.

    Raises:
        ConfigError: no text, no tokenizer, or a size out of range.
    """
    context = context or model.config.context
    check_request(model.config, rows, context, stride)
    if model.tokenizer is None:
        raise ConfigError("this model has no tokenizer, which bytes are counted with")
    way = Dispatch(dispatch) if dispatch else choose_dispatch()
    evaluate = functools.partial(
        _compiled, model.params, cfg=model.config, dtype=model.dtype, dispatch=way
    )
    rows += -rows % sharding.batch_share().of
    with _stored(model, source) as store:
        began = time.perf_counter()
        lengths = model.tokenizer.byte_lengths()
        found = heldout_loss(evaluate, store, rows, context, lengths, stride=stride)
        seconds = time.perf_counter() - began
    return {
        "nats_per_token": found.nats_per_token,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": math.exp(min(found.nats_per_token, 700.0)),  # beyond, a double overflows
        "tokens": int(found.tokens),
        "bytes": found.bytes,
        "seconds": round(seconds, 3),
    }


def check_request(config: ModelConfig, rows: int, context: int, stride: int) -> None:
    """Refuse sizes that cannot be scored.

    Raises:
        ConfigError: names the first.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}; it must be at least 1")
    if not 1 <= context <= config.context:
        raise ConfigError(f"context is {context}; the model takes 1..{config.context}")
    if not 0 <= stride <= context:
        raise ConfigError(f"stride is {stride}; it must be in 1..{context}, or 0 for no overlap")


@contextlib.contextmanager
def _stored(model: Model, source: Store | Iterable[str]) -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="k2jax-") as folder:
        if not isinstance(source, Store):
            source = write(Path(folder, "text"), source, model.tokenizer)
        if not source.bytes:
            raise ConfigError("there is no text to score")
        facts = {"tokens": source.size, "bytes": source.bytes}
        cluster.current().require_equal("text to score", facts)
        yield source


def total_loss(
    params: Params,
    batch: Batch,
    cfg: ModelConfig,
    dtype: str,
    dispatch: Dispatch = Dispatch(),  # noqa: B008, a constant
) -> tuple[jax.Array, jax.Array]:
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


_compiled = jax.jit(total_loss, static_argnames=("cfg", "dtype", "dispatch"))
