"""`k2jax evaluate`: how well a model predicts text it has not seen.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.data import Store
    from k2jax.model import Model

LONGEST = 4_096  # tokens of a row on the command line, where the model's context is longer


def score(
    model: "Model",
    source: "Store | Iterable[str]",
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


def _check(model: "Model", rows: int, context: int, stride: int) -> None:
    if rows < 1:
        raise ConfigError(f"rows is {rows}; it must be at least 1")
    if not 1 <= context <= model.config.context:
        raise ConfigError(f"context is {context}; the model takes 1..{model.config.context}")
    if not 0 <= stride <= context:
        raise ConfigError(f"stride is {stride}; it must be in 1..{context}, or 0 for no overlap")


@contextlib.contextmanager
def _stored(model: "Model", source: "Store | Iterable[str]") -> Iterator["Store"]:
    from k2jax.data import Store
    from k2jax.data.store import write

    with tempfile.TemporaryDirectory(prefix="k2jax-") as folder:
        if not isinstance(source, Store):
            if model.tokenizer is None:
                raise ConfigError("this model has no tokenizer; give tokenised documents")
            source = write(Path(folder, "text"), source, model.tokenizer)
        if not source.bytes:
            raise ConfigError("there is no text to score")
        yield source


def _total(
    model: "Model", store: "Store", rows: int, context: int, stride: int
) -> tuple[float, float]:
    """Negative log likelihood of all targets in nats, and how many they are."""
    from k2jax.data import eval_batches
    from k2jax.model.sample import batch_ways
    from k2jax.step import own_parts, to_devices

    rows += -rows % batch_ways()
    batches = eval_batches(store, rows, context, stride=stride, **own_parts())
    sums = [
        _program()(model.params, to_devices(batch), model.config, model.dtype) for batch in batches
    ]
    # Added in double precision: the sum over millions of tokens.
    return sum(float(nll) for nll, _ in sums), sum(float(count) for _, count in sums)


@functools.cache
def _program() -> Callable[..., Any]:
    import jax

    from k2jax.step import total_loss

    return jax.jit(total_loss, static_argnums=(2, 3))


def texts(path: str) -> list[str]:
    """What to score at `path`: every document; of the standard library the held-out modules.

    Raises:
        ConfigError: nothing there; the message has the nearest name.
    """
    from k2jax.data import sources

    source = sources.find(path)
    kept = set(sources.split(source).heldout) if source.title == sources.STDLIB else None
    return [text for name, text in source.documents() if kept is None or name in kept]


def heldout(path: str, model: "Model") -> "Store":
    """What a folder of tokens (`k2jax data`) holds out.

    Raises:
        ConfigError: the folder is damaged, or was not made with the model's tokenizer.
    """
    from k2jax.chat.tokenizer import Tokenizer
    from k2jax.data.tokens import open_tokens

    opened = open_tokens(path)
    mine = model.tokenizer
    if not isinstance(mine, Tokenizer) or mine.digest() != opened.manifest.tokenizer:
        raise ConfigError(f"{path} was made with another tokenizer than the model's")
    return opened.heldout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax evaluate`."""
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint, or a published folder")
    parser.add_argument(
        "--data", default="", metavar="FILE", help="text to score, all of it, or a folder of"
        " tokens: what it holds out; default: the modules of Python's standard library that"
        " training leaves out",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, default=0, metavar="N", help="tokens between overlapping windows;"
        " default: no overlap",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows at once; default: 8")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Print the scores, and what gzip and xz need for the same text; the exit code."""
    from k2jax.data.tokens import holds_tokens

    documents = [] if holds_tokens(args.data) else texts(args.data)
    from k2jax import startup
    from k2jax.data import compressors
    from k2jax.loading import load

    startup.prepare()
    model = load(args.checkpoint)
    context = min(model.config.context, LONGEST)
    if documents:
        result = score(model, documents, args.rows, context, args.stride)
    else:
        store = heldout(args.data, model)
        result = score(model, store, args.rows, context, args.stride)
        assert model.tokenizer, "heldout compared it"
        documents = list(store.texts(model.tokenizer))
    for name, bits in compressors(documents).items():
        result[f"{name}_bits_per_byte"] = bits
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    sys.stdout.write(
        f"{result['bits_per_byte']:.4f} bits per byte"
        f" (gzip -9: {result['gzip_bits_per_byte']:.4f}, xz -9: {result['xz_bits_per_byte']:.4f})\n"
        f"{result['nats_per_token']:.4f} nats per token, perplexity {result['perplexity']:.2f}\n"
        f"{result['tokens']} tokens, {result['bytes']} bytes in {result['seconds']:.1f} s\n"
    )
    return 0
